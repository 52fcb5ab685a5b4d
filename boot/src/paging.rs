//! The kernel's page tables.

use x86_64::{
    PhysAddr,
    structures::paging::page_table::{PageTableFlags as Flags, PageTableLevel},
};

use crate::{Error, PAGE, frames::Frames, physical::Memory};

/// What the kernel may do with a page: there is no way to ask for writable and executable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read.
    ReadOnly,
    /// Read and write.
    ReadWrite,
    /// Read and execute.
    Execute,
    /// Read and write, with the memory type of the page attribute table's entry 1: for a framebuffer,
    /// if the kernel makes that entry write-combining.
    Framebuffer,
}

impl Access {
    fn flags(self) -> Flags {
        Flags::PRESENT
            | match self {
                Self::ReadOnly => Flags::NO_EXECUTE,
                Self::ReadWrite => Flags::WRITABLE | Flags::NO_EXECUTE,
                Self::Execute => Flags::empty(),
                Self::Framebuffer => Flags::WRITABLE | Flags::NO_EXECUTE | Flags::WRITE_THROUGH,
            }
    }
}

/// The physical address bits of an entry (Intel SDM volume 3, "4-Level Paging and 5-Level
/// Paging").
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The page sizes, largest first, with the level of the table whose entry maps one.
const SIZES: [(u64, PageTableLevel); 3] =
    [(1 << 30, PageTableLevel::Three), (1 << 21, PageTableLevel::Two), (PAGE, PageTableLevel::One)];

/// Four-level page tables under construction.
pub struct Tables<'a, M> {
    /// The memory that holds them.
    pub memory: &'a mut M,
    /// Where new tables come from.
    pub frames: &'a mut Frames,
    root: PhysAddr,
}

impl<'a, M: Memory> Tables<'a, M> {
    /// Tables that map nothing.
    pub fn new(memory: &'a mut M, frames: &'a mut Frames) -> Result<Self, Error> {
        let root = new_table(memory, frames)?;
        Ok(Self { memory, frames, root })
    }

    /// The highest table: what belongs into CR3.
    pub fn root(&self) -> PhysAddr {
        self.root
    }

    /// Maps `bytes` bytes (rounded up to pages) of physical memory from `phys` on at `virt`, both
    /// page-aligned, with the largest pages for which alignment allows and `may_use(start, size)`
    /// is true; pages of 4 KiB need no leave. `what` names the mapping in errors.
    pub fn map(
        &mut self,
        what: &'static str,
        virt: u64,
        phys: PhysAddr,
        bytes: u64,
        access: Access,
        may_use: impl Fn(u64, u64) -> bool,
    ) -> Result<(), Error> {
        let bytes = bytes.next_multiple_of(PAGE);
        let mut done = 0;
        while done < bytes {
            let (virt, phys) = (virt + done, phys.as_u64() + done);
            let fits = |size| {
                (virt | phys) % size == 0
                    && size <= bytes - done
                    && (size == PAGE || may_use(phys, size))
            };
            let (size, level) =
                SIZES.into_iter().find(|(size, _)| fits(*size)).ok_or(Error::BadAddress {
                    what,
                    address: virt,
                    why: "the address is not page-aligned",
                })?;
            let large = if size == PAGE { Flags::empty() } else { Flags::HUGE_PAGE };
            self.set(what, virt, level, phys | (access.flags() | large).bits())?;
            done += size;
        }
        Ok(())
    }

    /// Makes the tables visible in the 512 GiB at `virt`, by an entry of the highest table that
    /// points to that table itself.
    pub fn map_recursively(&mut self, virt: u64) -> Result<(), Error> {
        let entry = self.root.as_u64() | Access::ReadWrite.flags().bits();
        self.set("the recursive page table", virt, PageTableLevel::Four, entry)
    }

    /// A table above the highest one, for a CPU in five-level paging: it makes the same addresses
    /// valid that four levels know, the lower and the upper half, through one entry each.
    pub fn fifth_level(&mut self) -> Result<PhysAddr, Error> {
        let top = new_table(self.memory, self.frames)?;
        let entry = self.root.as_u64() | (Flags::PRESENT | Flags::WRITABLE).bits();
        for index in [0, 511] {
            self.memory.write_entry(top + 8 * index, entry);
        }
        Ok(top)
    }

    /// Writes the entry for `virt` in the table of `level`, which must be empty, and makes the
    /// tables above as needed. Their entries allow everything: the last one decides.
    fn set(
        &mut self,
        what: &'static str,
        virt: u64,
        level: PageTableLevel,
        entry: u64,
    ) -> Result<(), Error> {
        let in_use =
            Error::BadAddress { what, address: virt, why: "the address is already mapped" };
        let slot = |table: PhysAddr, level: PageTableLevel| {
            let index = (virt >> (12 + 9 * (level as u64 - 1))) & 0x1ff;
            table + 8 * index
        };
        let mut table = self.root;
        let mut at = PageTableLevel::Four;
        while at != level {
            let found = self.memory.read_entry(slot(table, at));
            table = if found == 0 {
                let new = new_table(self.memory, self.frames)?;
                let flags = Flags::PRESENT | Flags::WRITABLE;
                self.memory.write_entry(slot(table, at), new.as_u64() | flags.bits());
                new
            } else if Flags::from_bits_retain(found).contains(Flags::HUGE_PAGE) {
                return Err(in_use);
            } else {
                PhysAddr::new(found & ADDRESS)
            };
            at = at.next_lower_level().ok_or(in_use)?;
        }
        if self.memory.read_entry(slot(table, level)) != 0 {
            return Err(in_use);
        }
        self.memory.write_entry(slot(table, level), entry);
        Ok(())
    }
}

fn new_table<M: Memory>(memory: &mut M, frames: &mut Frames) -> Result<PhysAddr, Error> {
    let table = frames.allocate(PAGE, "a page table")?;
    memory.zero(table, PAGE);
    Ok(table)
}

#[cfg(test)]
pub(crate) mod tests {
    use bootloader_api::info::MemoryRegion;

    use super::*;
    use crate::{
        memory_map::{E820Entry, MemoryMap},
        physical::recording::Recording,
    };

    /// One mapped page as the CPU would see it.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Page {
        pub virt: u64,
        pub phys: u64,
        pub size: u64,
        pub writable: bool,
        pub executable: bool,
        pub write_through: bool,
    }

    /// Walks tables the way the CPU does (rights of all levels combined), independently of the
    /// code under test. `skip` is a slot of the highest table not to follow.
    pub fn walk(memory: &Recording, root: PhysAddr, skip: Option<u64>) -> Vec<Page> {
        let mut pages = Vec::new();
        descend(memory, root.as_u64(), 3, 0, (true, true), skip, &mut pages);
        pages
    }

    fn descend(
        memory: &Recording,
        table: u64,
        level: u32,
        base: u64,
        rights: (bool, bool),
        skip: Option<u64>,
        pages: &mut Vec<Page>,
    ) {
        for index in (0..512).filter(|i| level < 3 || Some(*i) != skip) {
            let entry = memory.read_entry(PhysAddr::new(table + 8 * index));
            if entry & 1 == 0 {
                assert_eq!(entry, 0, "neither present nor empty");
                continue;
            }
            assert_eq!(entry & 4, 0, "user-accessible");
            let size = 1u64 << (12 + 9 * level);
            let virt = base + index * size;
            let virt = if level == 3 && index >= 256 { virt | 0xffff << 48 } else { virt };
            let rights = (rights.0 && entry & 2 != 0, rights.1 && entry >> 63 == 0);
            let address = entry & 0x000f_ffff_ffff_f000;
            if level == 0 || entry & 0x80 != 0 {
                assert!(level < 3 && address.is_multiple_of(size), "bad leaf {entry:#x}");
                let (writable, executable) = rights;
                let write_through = entry & 8 != 0;
                pages.push(Page { virt, phys: address, size, writable, executable, write_through });
            } else {
                descend(memory, address, level - 1, virt, rights, skip, pages);
            }
        }
    }

    pub fn frames(entries: &[(u64, u64, u32)]) -> (MemoryMap, Frames) {
        let reported: Vec<MemoryRegion> = entries
            .iter()
            .map(|&(start, len, kind)| E820Entry { start, len, kind }.into())
            .collect();
        let map = MemoryMap::new(&reported).unwrap();
        let frames = Frames::new(&map, PhysAddr::new(0x10_0000), PhysAddr::new(1 << 32));
        (map, frames)
    }

    const PLENTY: (u64, u64, u32) = (0x10_0000, 64 << 20, 1);

    #[test]
    fn rights_reach_the_leaves_and_nothing_is_writable_and_executable() {
        let mut memory = Recording::default();
        let (_, mut frames) = frames(&[PLENTY]);
        let mut tables = Tables::new(&mut memory, &mut frames).unwrap();
        let high = 0xffff_ffff_8000_0000;
        let maps = [
            (high, 0x40_0000, Access::ReadOnly, (false, false)),
            (high + 0x1000, 0x50_0000, Access::Execute, (false, true)),
            (high + 0x2000, 0x60_0000, Access::ReadWrite, (true, false)),
            (high + 0x3000, 0x70_0000, Access::Framebuffer, (true, false)),
            (0x1000, 0x1000, Access::Execute, (false, true)),
        ];
        for (virt, phys, access, _) in maps {
            tables.map("it", virt, PhysAddr::new(phys), 0x1000, access, |_, _| true).unwrap();
        }
        let root = tables.root();
        let mut expected = maps.map(|(virt, phys, access, (writable, executable))| Page {
            virt,
            phys,
            size: 0x1000,
            writable,
            executable,
            write_through: access == Access::Framebuffer,
        });
        expected.sort_by_key(|p| p.virt);
        assert_eq!(walk(&memory, root, None), expected);
    }

    #[test]
    fn every_table_comes_from_the_frames_and_is_cleared_first() {
        let mut memory = Recording::default();
        let (_, mut frames) = frames(&[PLENTY]);
        let mut tables = Tables::new(&mut memory, &mut frames).unwrap();
        let at = PhysAddr::new(0x1234_5000);
        tables.map("it", 0x7fff_ffff_e000, at, 0x2000, Access::ReadOnly, |_, _| true).unwrap();
        let given = frames.regions().next().unwrap();
        assert_eq!((given.start, given.end), (0x10_0000, 0x10_4000));
        // Recording fails on writes to entries of tables that were not cleared.
        assert_eq!(memory.entries.len(), 5);
        assert!(memory.entries.iter().all(|(at, _)| (given.start..given.end).contains(at)));
    }

    #[test]
    fn large_pages_where_alignment_and_leave_allow() {
        let mut memory = Recording::default();
        let (_, mut frames) = frames(&[PLENTY]);
        let mut tables = Tables::new(&mut memory, &mut frames).unwrap();
        let base = 0xffff_8000_0000_0000;
        let bytes = (2 << 30) + (3 << 20) + 1;
        let may = |start: u64, size: u64| size < 1 << 30 || start >= 1 << 30;
        tables.map("it", base, PhysAddr::zero(), bytes, Access::ReadWrite, may).unwrap();
        let root = tables.root();
        let pages = walk(&memory, root, None);
        let count = |size| pages.iter().filter(|p| p.size == size).count();
        // First GiB without leave: 512 of 2 MiB; the second in one; 2 MiB; then 257 small ones.
        assert_eq!((count(1 << 30), count(1 << 21), count(PAGE)), (1, 513, 257));
        let mut next = 0;
        for page in pages {
            assert_eq!((page.virt, page.phys), (base + next, next));
            next += page.size;
        }
        assert_eq!(next, (2 << 30) + (3 << 20) + PAGE);
    }

    #[test]
    fn terabytes_with_and_without_1_gib_pages() {
        for (gib_pages, tables_expected) in [(true, 1 + 1 + 4), (false, 1 + 1 + 4 + 2048)] {
            let mut memory = Recording::default();
            let (_, mut frames) = frames(&[PLENTY]);
            let mut tables = Tables::new(&mut memory, &mut frames).unwrap();
            let base = 0xffff_8000_0000_0000;
            let may = |_, size| gib_pages || size < 1 << 30;
            tables.map("it", 0x1000, PhysAddr::zero(), 1, Access::Execute, may).unwrap();
            let before = tables.memory.entries.len();
            tables.map("it", base, PhysAddr::zero(), 2 << 40, Access::ReadWrite, may).unwrap();
            let leaves = if gib_pages { 2048 } else { 2048 * 512 };
            let linked = memory.entries.len() - before - leaves;
            assert_eq!(linked, tables_expected - 2);
        }
    }

    #[test]
    fn mapping_twice_is_refused_at_every_level() {
        let mut memory = Recording::default();
        let (_, mut frames) = frames(&[PLENTY]);
        let mut tables = Tables::new(&mut memory, &mut frames).unwrap();
        let zero = PhysAddr::zero();
        tables.map("large", 0, zero, 2 << 30, Access::ReadWrite, |_, _| true).unwrap();
        tables.map("small", 5 << 30, zero, 0x1000, Access::ReadWrite, |_, _| true).unwrap();
        let mut again = |virt, bytes| {
            tables.map("again", virt, zero, bytes, Access::ReadOnly, |_, _| true).unwrap_err()
        };
        for (virt, bytes) in [(0, 1 << 30), (0x1000, 1), (1 << 21, 1 << 21), (5 << 30, 1)] {
            let why = "the address is already mapped";
            assert_eq!(again(virt, bytes), Error::BadAddress { what: "again", address: virt, why });
        }
    }

    #[test]
    fn running_out_of_memory_is_an_error() {
        let mut memory = Recording::default();
        let (_, mut frames) = frames(&[(0x10_0000, 0x2000, 1)]);
        let mut tables = Tables::new(&mut memory, &mut frames).unwrap();
        let refused =
            tables.map("it", 0, PhysAddr::zero(), 1, Access::ReadOnly, |_, _| true).unwrap_err();
        assert_eq!(refused, Error::NoMemory { what: "a page table", bytes: PAGE, largest: 0 });
    }

    #[test]
    fn unaligned_addresses_are_refused() {
        let mut memory = Recording::default();
        let (_, mut frames) = frames(&[PLENTY]);
        let mut tables = Tables::new(&mut memory, &mut frames).unwrap();
        let refused = tables.map("it", 0x1234, PhysAddr::zero(), 1, Access::ReadOnly, |_, _| true);
        assert!(matches!(refused, Err(Error::BadAddress { address: 0x1234, .. })));
    }

    #[test]
    fn recursive_entry_points_to_the_root() {
        let mut memory = Recording::default();
        let (_, mut frames) = frames(&[PLENTY]);
        let mut tables = Tables::new(&mut memory, &mut frames).unwrap();
        tables.map_recursively(510 << 39 | 0xffff << 48).unwrap();
        assert!(tables.map_recursively(510 << 39 | 0xffff << 48).is_err());
        let root = tables.root();
        let entry = memory.read_entry(root + 8 * 510u64);
        assert_eq!(entry, root.as_u64() | 1 << 63 | 0b11);
        assert_eq!(walk(&memory, root, Some(510)), []);
    }
}
