//! Extended page tables: guest-physical to host-physical.
//!
//! Source: SDM volume 3, chapter "VMX Support for Address Translation", section "The Extended
//! Page Table Mechanism (EPT)". The code is generic over the memory that holds the tables, so that
//! host tests run it against a memory that records.

use bitflags::bitflags;

use crate::addr::{GuestPhysAddr, HostPhysAddr};
use crate::instruction::{InvEpt, VmFail, invept};

bitflags! {
    /// What the guest may do with a page.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Permissions: u64 {
        /// Data reads.
        const READ = 1 << 0;
        /// Data writes.
        const WRITE = 1 << 1;
        /// Instruction fetches.
        const EXECUTE = 1 << 2;
    }
}

impl Permissions {
    /// Writable but not readable is an EPT misconfiguration, executable but not readable one on
    /// some CPUs: SDM volume 3, section "EPT Misconfigurations". Nothing at all is no page.
    fn check(self) -> Result<(), MapError> {
        if self.contains(Self::READ) { Ok(()) } else { Err(MapError::BadPermissions) }
    }
}

/// Bits 5:3 of a leaf entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemoryType {
    /// UC.
    Uncacheable = 0,
    /// WB.
    WriteBack = 6,
}

/// Size of a leaf page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PageSize {
    /// 4 KiB: a leaf in an EPT page table.
    Size4K = 0,
    /// 2 MiB: a leaf in an EPT page directory.
    Size2M = 1,
    /// 1 GiB: a leaf in an EPT page-directory-pointer table, on CPUs that have them
    /// ([`crate::capability::Capabilities::ept_1g_pages`]).
    Size1G = 2,
}

impl PageSize {
    /// The level of the table that holds the leaf: 0 is an EPT page table.
    const fn level(self) -> u32 {
        self as u32
    }

    /// In bytes.
    pub const fn bytes(self) -> u64 {
        4096 << (9 * self.level())
    }

    const fn of_level(level: u32) -> Option<Self> {
        match level {
            0 => Some(Self::Size4K),
            1 => Some(Self::Size2M),
            2 => Some(Self::Size1G),
            _ => None,
        }
    }
}

/// Where tables live. A table is a zeroed 4-KiB frame of 512 entries.
pub trait TableMemory {
    /// A zeroed frame; `None` when there is none left.
    fn allocate(&mut self) -> Option<HostPhysAddr>;
    /// Takes a frame of [`Self::allocate`] back.
    fn free(&mut self, table: HostPhysAddr);
    /// Reads entry `index` (below 512).
    fn read(&self, table: HostPhysAddr, index: usize) -> u64;
    /// Writes entry `index` (below 512).
    fn write(&mut self, table: HostPhysAddr, index: usize, entry: u64);
}

/// Why a page could not be mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MapError {
    /// No frame is left for a table.
    OutOfMemory,
    /// The guest-physical address has more than 48 bits, or an address is not aligned to the page.
    BadAddress,
    /// Something is mapped there already.
    Occupied,
    /// Nothing is mapped there.
    NotMapped,
    /// Permissions without [`Permissions::READ`].
    BadPermissions,
}

/// One page as it is mapped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Page {
    /// The host-physical address behind the guest-physical one that was asked for.
    pub hpa: HostPhysAddr,
    /// The page's size.
    pub size: PageSize,
    /// What the guest may do with it.
    pub permissions: Permissions,
    /// Whether the guest has used it; meaningful with accessed and dirty flags only.
    pub accessed: bool,
    /// Whether the guest has written to it; likewise.
    pub dirty: bool,
}

/// Translations that the CPU may still hold: to be given to [`Self::invalidate`].
#[derive(Debug)]
#[must_use = "the CPU goes on using the old translation until INVEPT"]
pub struct StaleTranslations {
    eptp: u64,
}

impl StaleTranslations {
    /// Drops them on this CPU by INVEPT.
    ///
    /// # Errors
    ///
    /// VMfail.
    ///
    /// # Safety
    ///
    /// In VMX root operation; no other CPU has used these tables since it last invalidated them.
    pub unsafe fn invalidate(self) -> Result<(), VmFail> {
        // SAFETY: the caller's obligation.
        unsafe { invept(InvEpt::SingleContext(self.eptp)) }
    }

    /// For tables that no CPU knows anything of: none has ever used them, or each has dropped what
    /// it knew since.
    pub fn held_by_none(self) {}
}

/// Bits 51:12 of an entry.
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;
/// Bit 7 of an entry above the last level: it is a leaf.
const LEAF: u64 = 1 << 7;
/// Bit 8 of an entry: used.
const ACCESSED: u64 = 1 << 8;
/// Bit 9 of a leaf: written to.
const DIRTY: u64 = 1 << 9;
/// Bit 6 of the EPT pointer: the CPU sets these two.
const POINTER_ACCESSED_DIRTY: u64 = 1 << 6;
/// Bits 2:0: all zero means "not present".
const PRESENT: u64 = 7;
/// The root's level: four-level tables.
const ROOT_LEVEL: u32 = 3;

/// A set of four-level extended page tables.
#[derive(Debug)]
pub struct Ept {
    root: HostPhysAddr,
    accessed_dirty: bool,
}

impl Ept {
    /// Empty tables: the guest sees no memory. `accessed_dirty`: the CPU is to set the flags of
    /// that name, which it must offer
    /// ([`crate::capability::Capabilities::ept_accessed_dirty`]).
    ///
    /// # Errors
    ///
    /// [`MapError::OutOfMemory`].
    pub fn new(memory: &mut impl TableMemory, accessed_dirty: bool) -> Result<Self, MapError> {
        let root = memory.allocate().ok_or(MapError::OutOfMemory)?;
        Ok(Self { root, accessed_dirty })
    }

    /// The EPT pointer for the VMCS: write-back tables (6), a walk of four (3 in bits 5:3).
    pub const fn pointer(&self) -> u64 {
        let flags = if self.accessed_dirty { POINTER_ACCESSED_DIRTY } else { 0 };
        self.root.as_u64() | flags | (ROOT_LEVEL as u64) << 3 | MemoryType::WriteBack as u64
    }

    const fn index(gpa: u64, level: u32) -> usize {
        (gpa >> (12 + 9 * level)) as usize & 0x1ff
    }

    /// Maps one page. New translations need no INVEPT: "not present" is never cached.
    ///
    /// # Errors
    ///
    /// [`MapError`]; nothing is mapped then, and no table is kept.
    pub fn map(
        &mut self,
        memory: &mut impl TableMemory,
        gpa: GuestPhysAddr,
        hpa: HostPhysAddr,
        size: PageSize,
        permissions: Permissions,
        kind: MemoryType,
    ) -> Result<(), MapError> {
        let (gpa, hpa) = (gpa.as_u64(), hpa.as_u64());
        if gpa >> 48 != 0 || (gpa | hpa) & (size.bytes() - 1) != 0 {
            return Err(MapError::BadAddress);
        }
        permissions.check()?;
        let (mut table, mut level) = (self.root, ROOT_LEVEL);
        loop {
            let entry = memory.read(table, Self::index(gpa, level));
            if entry & PRESENT == 0 {
                break;
            }
            if level == size.level() || entry & LEAF != 0 {
                return Err(MapError::Occupied);
            }
            table = HostPhysAddr::new_truncate(entry & ADDRESS);
            level -= 1;
        }
        let leaf = if size.level() > 0 { LEAF } else { 0 };
        let mut entry = hpa | permissions.bits() | (kind as u64) << 3 | leaf;
        // From the leaf upwards, so that one write links all of it or, without memory, nothing.
        for below in size.level()..level {
            let Some(next) = memory.allocate() else {
                if below > size.level() {
                    let unused = HostPhysAddr::new_truncate(entry & ADDRESS);
                    Self::free_below(memory, unused, below - 1);
                }
                return Err(MapError::OutOfMemory);
            };
            memory.write(next, Self::index(gpa, below), entry);
            entry = next.as_u64() | PRESENT;
        }
        memory.write(table, Self::index(gpa, level), entry);
        Ok(())
    }

    /// Unmaps the page that holds `gpa`, and gives back the tables that this leaves empty, so that
    /// a guest cannot make them pile up.
    pub fn unmap(
        &mut self,
        memory: &mut impl TableMemory,
        gpa: GuestPhysAddr,
    ) -> StaleTranslations {
        // What is beyond the tables is nowhere mapped, and must not be taken for what is below.
        if gpa.as_u64() >> 48 == 0 {
            self.unmap_below(memory, self.root, ROOT_LEVEL, gpa.as_u64());
        }
        StaleTranslations { eptp: self.pointer() }
    }

    /// Whether `table` is empty now.
    fn unmap_below(
        &mut self,
        memory: &mut impl TableMemory,
        table: HostPhysAddr,
        level: u32,
        gpa: u64,
    ) -> bool {
        let index = Self::index(gpa, level);
        let entry = memory.read(table, index);
        if entry & PRESENT == 0 {
            return false;
        }
        if level > 0 && entry & LEAF == 0 {
            let next = HostPhysAddr::new_truncate(entry & ADDRESS);
            if !self.unmap_below(memory, next, level - 1, gpa) {
                return false;
            }
            memory.free(next);
        }
        memory.write(table, index, 0);
        (0..512).all(|index| memory.read(table, index) & PRESENT == 0)
    }

    /// The table that holds the leaf of `gpa`, the leaf's index in it, its level, and the leaf;
    /// `None` where nothing is mapped.
    fn leaf(
        &self,
        memory: &impl TableMemory,
        gpa: GuestPhysAddr,
    ) -> Option<(HostPhysAddr, usize, u32, u64)> {
        let gpa = gpa.as_u64();
        (gpa >> 48 == 0).then_some(())?;
        let mut table = self.root;
        for level in (0..=ROOT_LEVEL).rev() {
            let index = Self::index(gpa, level);
            let entry = memory.read(table, index);
            (entry & PRESENT != 0).then_some(())?;
            if level == 0 || entry & LEAF != 0 {
                return Some((table, index, level, entry));
            }
            table = HostPhysAddr::new_truncate(entry & ADDRESS);
        }
        None
    }

    /// How `gpa` is mapped, if it is.
    pub fn page(&self, memory: &impl TableMemory, gpa: GuestPhysAddr) -> Option<Page> {
        let (_, _, level, entry) = self.leaf(memory, gpa)?;
        let size = PageSize::of_level(level)?;
        let offset = size.bytes() - 1;
        let hpa = entry & ADDRESS & !offset | gpa.as_u64() & offset;
        Some(Page {
            hpa: HostPhysAddr::new_truncate(hpa),
            size,
            permissions: Permissions::from_bits_truncate(entry),
            accessed: entry & ACCESSED != 0,
            dirty: entry & DIRTY != 0,
        })
    }

    /// Clears the page's accessed and dirty flags. The CPU sets them again only once it has
    /// dropped its translation.
    ///
    /// # Errors
    ///
    /// [`MapError::NotMapped`].
    pub fn clear_accessed_dirty(
        &mut self,
        memory: &mut impl TableMemory,
        gpa: GuestPhysAddr,
    ) -> Result<StaleTranslations, MapError> {
        let (table, index, _, entry) = self.leaf(memory, gpa).ok_or(MapError::NotMapped)?;
        memory.write(table, index, entry & !(ACCESSED | DIRTY));
        Ok(StaleTranslations { eptp: self.pointer() })
    }

    /// Changes what the guest may do with the page that holds `gpa`, as large as it is mapped.
    ///
    /// # Errors
    ///
    /// [`MapError::NotMapped`], [`MapError::BadPermissions`].
    pub fn protect(
        &mut self,
        memory: &mut impl TableMemory,
        gpa: GuestPhysAddr,
        permissions: Permissions,
    ) -> Result<StaleTranslations, MapError> {
        permissions.check()?;
        let (table, index, _, entry) = self.leaf(memory, gpa).ok_or(MapError::NotMapped)?;
        memory.write(table, index, entry & !PRESENT | permissions.bits());
        Ok(StaleTranslations { eptp: self.pointer() })
    }

    /// Breaks the large page that holds `gpa` into 512 of the next smaller size with the same
    /// permissions, memory type and flags.
    ///
    /// # Errors
    ///
    /// [`MapError::NotMapped`], also for a 4-KiB page; [`MapError::OutOfMemory`]. Nothing has
    /// changed then.
    pub fn split(
        &mut self,
        memory: &mut impl TableMemory,
        gpa: GuestPhysAddr,
    ) -> Result<StaleTranslations, MapError> {
        let (table, index, level, entry) = self.leaf(memory, gpa).ok_or(MapError::NotMapped)?;
        let smaller = level.checked_sub(1).ok_or(MapError::NotMapped)?;
        let step = 4096u64 << (9 * smaller);
        // Bit 7 is reserved in a 4-KiB leaf.
        let first = if smaller == 0 { entry & !LEAF } else { entry };
        let next = memory.allocate().ok_or(MapError::OutOfMemory)?;
        for (child, offset) in (0..512).zip((0..).step_by(step as usize)) {
            memory.write(next, child, first + offset);
        }
        memory.write(table, index, next.as_u64() | PRESENT);
        Ok(StaleTranslations { eptp: self.pointer() })
    }

    /// Gives all tables back; the pages that they map are the caller's.
    pub fn destroy(self, memory: &mut impl TableMemory) -> StaleTranslations {
        let stale = StaleTranslations { eptp: self.pointer() };
        Self::free_below(memory, self.root, ROOT_LEVEL);
        stale
    }

    fn free_below(memory: &mut impl TableMemory, table: HostPhysAddr, level: u32) {
        if level > 0 {
            for index in 0..512 {
                let entry = memory.read(table, index);
                if entry & PRESENT != 0 && entry & LEAF == 0 {
                    Self::free_below(
                        memory,
                        HostPhysAddr::new_truncate(entry & ADDRESS),
                        level - 1,
                    );
                }
            }
        }
        memory.free(table);
    }
}

#[cfg(test)]
mod properties;

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    /// Records every table; refuses an access to a frame that it has not given out.
    #[derive(Default)]
    pub(super) struct Recorder {
        pub(super) tables: BTreeMap<u64, [u64; 512]>,
        next: u64,
        pub(super) limit: usize,
    }

    impl Recorder {
        pub(super) fn with_limit(limit: usize) -> Self {
            Self { limit, ..Self::default() }
        }
    }

    impl TableMemory for Recorder {
        fn allocate(&mut self) -> Option<HostPhysAddr> {
            if self.tables.len() == self.limit {
                return None;
            }
            self.next += 0x1000;
            self.tables.insert(self.next, [0; 512]);
            HostPhysAddr::new(self.next)
        }
        fn free(&mut self, table: HostPhysAddr) {
            assert!(self.tables.remove(&table.as_u64()).is_some(), "freed twice: {table:?}");
        }
        fn read(&self, table: HostPhysAddr, index: usize) -> u64 {
            self.tables[&table.as_u64()][index]
        }
        fn write(&mut self, table: HostPhysAddr, index: usize, entry: u64) {
            self.tables.get_mut(&table.as_u64()).expect("a live table")[index] = entry;
        }
    }

    const RWX: Permissions = Permissions::all();

    fn gpa(address: u64) -> GuestPhysAddr {
        GuestPhysAddr::new(address).unwrap()
    }
    fn hpa(address: u64) -> HostPhysAddr {
        HostPhysAddr::new(address).unwrap()
    }

    #[test]
    fn what_is_mapped_translates_and_nothing_else_does() {
        let mut memory = Recorder::with_limit(100);
        let mut ept = Ept::new(&mut memory, false).unwrap();
        let (wb, read) = (MemoryType::WriteBack, Permissions::READ);
        for (at, to, size, permissions, kind) in [
            (0, 0x4000_0000, PageSize::Size2M, RWX, wb),
            (0x7fff_f000, 0x5000, PageSize::Size4K, read, MemoryType::Uncacheable),
            (3 << 30, 5 << 30, PageSize::Size1G, RWX, wb),
        ] {
            ept.map(&mut memory, gpa(at), hpa(to), size, permissions, kind).unwrap();
        }
        let at = |address| {
            ept.page(&memory, gpa(address)).map(|page| (page.hpa, page.size, page.permissions))
        };
        assert_eq!(at(0x1f_ffff), Some((hpa(0x401f_ffff), PageSize::Size2M, RWX)));
        assert_eq!(at(0x20_0000), None);
        assert_eq!(at(0x7fff_f123), Some((hpa(0x5123), PageSize::Size4K, read)));
        assert_eq!(at(0x7fff_e123), None);
        assert_eq!(at(0xffff_ffff), Some((hpa(0x1_7fff_ffff), PageSize::Size1G, RWX)));
        assert_eq!(at(1 << 32), None);
        assert_eq!(at(1 << 48), None);
    }

    #[test]
    fn splitting_changes_the_size_and_nothing_else() {
        let mut memory = Recorder::with_limit(100);
        let mut ept = Ept::new(&mut memory, true).unwrap();
        let rw = Permissions::READ | Permissions::WRITE;
        let (size, wb) = (PageSize::Size1G, MemoryType::WriteBack);
        ept.map(&mut memory, gpa(1 << 30), hpa(2 << 30), size, rw, wb).unwrap();
        let inside = gpa(0x5234_5678);
        for smaller in [PageSize::Size2M, PageSize::Size4K] {
            ept.split(&mut memory, inside).unwrap().held_by_none();
            for address in [0x5234_5678, 0x5234_5000, 0x5220_0000] {
                let page = ept.page(&memory, gpa(address)).unwrap();
                assert_eq!((page.hpa, page.permissions), (hpa(address + (1 << 30)), rw));
                assert_eq!(page.size, smaller);
            }
        }
        // Elsewhere in the gigabyte pages are still large.
        assert_eq!(ept.page(&memory, gpa(0x4000_0000)).unwrap().size, PageSize::Size2M);
        assert_eq!(ept.split(&mut memory, inside).unwrap_err(), MapError::NotMapped);
        ept.protect(&mut memory, inside, Permissions::READ).unwrap().held_by_none();
        assert_eq!(ept.page(&memory, inside).unwrap().permissions, Permissions::READ);
        assert_eq!(ept.page(&memory, gpa(0x5234_6000)).unwrap().permissions, rw);
        ept.destroy(&mut memory).held_by_none();
        assert!(memory.tables.is_empty());
    }

    #[test]
    fn flags_are_read_and_cleared() {
        let mut memory = Recorder::with_limit(100);
        let mut ept = Ept::new(&mut memory, true).unwrap();
        assert_eq!(ept.pointer(), 0x1000 | 0x5e);
        let (size, wb) = (PageSize::Size2M, MemoryType::WriteBack);
        ept.map(&mut memory, gpa(0), hpa(0), size, RWX, wb).unwrap();
        // What the CPU would do.
        let (table, index, _, entry) = ept.leaf(&memory, gpa(0)).unwrap();
        memory.write(table, index, entry | ACCESSED | DIRTY);
        let page = ept.page(&memory, gpa(0x1234)).unwrap();
        assert!(page.accessed && page.dirty);
        ept.clear_accessed_dirty(&mut memory, gpa(0)).unwrap().held_by_none();
        let page = ept.page(&memory, gpa(0)).unwrap();
        assert!(!page.accessed && !page.dirty && page.permissions == RWX);
        let nowhere = ept.clear_accessed_dirty(&mut memory, gpa(1 << 30));
        assert_eq!(nowhere.unwrap_err(), MapError::NotMapped);
    }

    #[test]
    fn bad_addresses_and_double_mappings_are_refused() {
        let mut memory = Recorder::with_limit(100);
        let mut ept = Ept::new(&mut memory, false).unwrap();
        let wb = MemoryType::WriteBack;
        let mut map = |g, h, size| ept.map(&mut memory, gpa(g), hpa(h), size, RWX, wb);
        assert_eq!(map(0x1000, 0, PageSize::Size2M), Err(MapError::BadAddress));
        assert_eq!(map(0, 0x1000, PageSize::Size2M), Err(MapError::BadAddress));
        assert_eq!(map(1 << 48, 0, PageSize::Size4K), Err(MapError::BadAddress));
        map(0, 0, PageSize::Size2M).unwrap();
        assert_eq!(map(0x1000, 0, PageSize::Size4K), Err(MapError::Occupied));
        assert_eq!(map(0, 0, PageSize::Size2M), Err(MapError::Occupied));
    }

    #[test]
    fn unmapping_gives_every_empty_table_back() {
        let mut memory = Recorder::with_limit(100);
        let mut ept = Ept::new(&mut memory, false).unwrap();
        let wb = MemoryType::WriteBack;
        ept.map(&mut memory, gpa(0), hpa(0), PageSize::Size4K, RWX, wb).unwrap();
        for page in 1..40u64 {
            let far = gpa(page << 39 | page << 12);
            ept.map(&mut memory, far, hpa(0x1000), PageSize::Size4K, RWX, wb).unwrap();
            ept.unmap(&mut memory, far).held_by_none();
            assert_eq!(ept.page(&memory, far), None);
        }
        assert_eq!(memory.tables.len(), 4);
        assert!(ept.page(&memory, gpa(0)).is_some());
        ept.destroy(&mut memory).held_by_none();
        assert!(memory.tables.is_empty());
    }

    #[test]
    fn running_out_of_tables_is_an_error() {
        let mut memory = Recorder::with_limit(2);
        let mut ept = Ept::new(&mut memory, false).unwrap();
        let result =
            ept.map(&mut memory, gpa(0), hpa(0), PageSize::Size4K, RWX, MemoryType::WriteBack);
        assert_eq!(result, Err(MapError::OutOfMemory));
        assert_eq!(ept.page(&memory, gpa(0)), None);
        assert_eq!(memory.tables.len(), 1, "what was allocated on the way is given back");
    }

    #[test]
    fn addresses_beyond_the_tables_are_no_others() {
        let mut memory = Recorder::with_limit(100);
        let mut ept = Ept::new(&mut memory, false).unwrap();
        let (size, wb) = (PageSize::Size4K, MemoryType::WriteBack);
        ept.map(&mut memory, gpa(0), hpa(0), size, RWX, wb).unwrap();
        ept.unmap(&mut memory, gpa(1 << 48)).held_by_none();
        assert!(ept.page(&memory, gpa(0)).is_some());
    }

    #[test]
    fn a_page_that_cannot_be_read_is_refused() {
        let mut memory = Recorder::with_limit(100);
        let mut ept = Ept::new(&mut memory, false).unwrap();
        let (size, wb) = (PageSize::Size4K, MemoryType::WriteBack);
        ept.map(&mut memory, gpa(0), hpa(0), size, RWX, wb).unwrap();
        for bad in [Permissions::empty(), Permissions::WRITE, RWX - Permissions::READ] {
            let mapped = ept.map(&mut memory, gpa(0x1000), hpa(0), size, bad, wb);
            assert_eq!(mapped, Err(MapError::BadPermissions));
            let protected = ept.protect(&mut memory, gpa(0), bad);
            assert_eq!(protected.unwrap_err(), MapError::BadPermissions);
        }
        assert_eq!(ept.page(&memory, gpa(0)).map(|page| page.permissions), Some(RWX));
    }

    #[test]
    fn the_pointer_names_four_levels_and_write_back() {
        let mut memory = Recorder::with_limit(1);
        assert_eq!(Ept::new(&mut memory, false).unwrap().pointer(), 0x1000 | 0x1e);
    }
}
