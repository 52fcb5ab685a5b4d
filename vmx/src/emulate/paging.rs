//! Where the guest may write and execute, by its own page tables, and the marks that a write leaves in
//! them.
//!
//! Source: SDM volume 3, chapter "Paging", sections "Access Rights" and "Accessed and Dirty Flags".
//! Protection keys are not offered to guests.

use crate::addr::GuestPhysAddr;
use crate::walk::{ADDRESS, GuestRead, GuestWrite, LARGE, PRESENT, Paging, entry32};

const WRITABLE: u64 = 1 << 1;
const USER: u64 = 1 << 2;
const ACCESSED: u64 = 1 << 5;
const DIRTY: u64 = 1 << 6;
const EXECUTE_DISABLE: u64 = 1 << 63;

/// What decides about a data access besides the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rights {
    /// The access is made at CPL 3.
    pub user: bool,
    /// CR0.WP.
    pub write_protect: bool,
    /// CR4.SMAP, and EFLAGS.AC does not lift it.
    pub smap: bool,
    /// CR4.SMEP.
    pub smep: bool,
    /// IA32_EFER.NXE: without it, bit 63 of an entry is reserved.
    pub execute_disable: bool,
    /// How many bits a physical address of the guest has: those above are reserved.
    pub physical_bits: u32,
}

/// A translation's way through the tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Writable {
    /// What the linear address stands for.
    pub gpa: GuestPhysAddr,
    /// Address and value of each entry that was used, the last one first.
    entries: [(u64, u64); 5],
    count: usize,
    entry_bytes: usize,
}

/// The guest-physical address behind `linear`, if the guest may read and write there and the tables are
/// all in its memory. With `None` the instruction faults, or what it does is not known here.
pub fn translate_for_write(
    memory: &impl GuestWrite,
    paging: Paging,
    cr3: u64,
    pdptes: [u64; 4],
    rights: Rights,
    linear: u64,
) -> Option<Writable> {
    let mut way = Way::new(memory, rights);
    let gpa = way.walk(paging, cr3, pdptes, linear)?;
    if paging != Paging::Off {
        way.check_write()?;
    }
    Some(Writable {
        gpa: GuestPhysAddr::new(gpa)?,
        entries: way.entries,
        count: way.count,
        entry_bytes: if matches!(paging, Paging::Bits32 { .. }) { 4 } else { 8 },
    })
}

/// Whether the guest may fetch an instruction's byte at `linear`, and the tables are all in its memory.
pub fn may_fetch(
    memory: &impl GuestRead,
    paging: Paging,
    cr3: u64,
    pdptes: [u64; 4],
    rights: Rights,
    linear: u64,
) -> bool {
    let mut way = Way::new(memory, rights);
    way.walk(paging, cr3, pdptes, linear).is_some() && (paging == Paging::Off || way.can_fetch())
}

impl Writable {
    /// Sets the accessed flags, and the dirty flag of the page.
    pub fn mark(&self, memory: &impl GuestWrite) {
        for (index, (at, entry)) in self.entries[..self.count].iter().enumerate() {
            let marked = entry | ACCESSED | if index == self.count - 1 { DIRTY } else { 0 };
            if marked != *entry {
                let bytes = marked.to_le_bytes();
                // It was read there: it is the guest's memory.
                memory.write(GuestPhysAddr::new_truncate(*at), &bytes[..self.entry_bytes]);
            }
        }
    }
}

/// A walk under way.
struct Way<'a, M> {
    memory: &'a M,
    rights: Rights,
    entries: [(u64, u64); 5],
    count: usize,
    /// [`WRITABLE`] and [`USER`], as far as all entries give them.
    permitted: u64,
    /// [`EXECUTE_DISABLE`], if any entry has it.
    forbidden: u64,
}

impl<'a, M: GuestRead> Way<'a, M> {
    fn new(memory: &'a M, rights: Rights) -> Self {
        let permitted = WRITABLE | USER;
        Self { memory, rights, entries: [(0, 0); 5], count: 0, permitted, forbidden: 0 }
    }

    fn walk(&mut self, paging: Paging, cr3: u64, pdptes: [u64; 4], linear: u64) -> Option<u64> {
        match paging {
            Paging::Off => Some(linear & 0xffff_ffff),
            Paging::Bits32 { page_size_extensions } => {
                self.descend_32(cr3, page_size_extensions, linear)
            }
            Paging::Pae => {
                let pdpte = pdptes[(linear >> 30 & 3) as usize];
                (pdpte & PRESENT != 0).then_some(())?;
                self.descend(pdpte & ADDRESS, 1, linear)
            }
            Paging::FourLevel => self.descend(cr3 & ADDRESS, 3, linear),
        }
    }

    fn descend(&mut self, root: u64, top: u32, linear: u64) -> Option<u64> {
        let mut table = root;
        for level in (0..=top).rev() {
            let at = table + (linear >> (12 + 9 * level) & 0x1ff) * 8;
            let entry = self.memory.read_u64(GuestPhysAddr::new(at)?)?;
            let is_page = level == 0 || level < 3 && entry & LARGE != 0;
            let offset = (4096u64 << (9 * level)) - 1;
            let mut reserved = ADDRESS & !low_bits(self.rights.physical_bits);
            if !self.rights.execute_disable {
                reserved |= EXECUTE_DISABLE;
            }
            if is_page && level > 0 {
                // Bit 12 is part of the memory type.
                reserved |= ADDRESS & offset & !0x1fff;
            }
            if level == 3 {
                reserved |= LARGE;
            }
            if top == 1 {
                // PAE: bits 62:52 are reserved.
                reserved |= 0x7ff0_0000_0000_0000;
            }
            self.take(at, entry, reserved)?;
            if is_page {
                return Some(entry & ADDRESS & !offset | linear & offset);
            }
            table = entry & ADDRESS;
        }
        None
    }

    fn descend_32(&mut self, cr3: u64, large_pages: bool, linear: u64) -> Option<u64> {
        let at = (cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4;
        let pde = entry32(self.memory, at)?;
        if pde & LARGE != 0 && large_pages {
            let high = (pde >> 13 & 0xff) << 32;
            // PSE-36: the address bits above those that there are, and bit 21, are reserved.
            self.take(at, pde, 1 << 21)?;
            (high & !low_bits(self.rights.physical_bits.min(40)) == 0).then_some(())?;
            return Some(high | pde & 0xffc0_0000 | linear & 0x3f_ffff);
        }
        self.take(at, pde, 0)?;
        let at = (pde & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4;
        let pte = entry32(self.memory, at)?;
        self.take(at, pte, 0)?;
        Some(pte & 0xffff_f000 | linear & 0xfff)
    }

    fn take(&mut self, at: u64, entry: u64, reserved: u64) -> Option<()> {
        if entry & PRESENT == 0 || entry & reserved != 0 {
            return None;
        }
        self.permitted &= entry;
        self.forbidden |= entry & EXECUTE_DISABLE;
        self.entries[self.count] = (at, entry);
        self.count += 1;
        Some(())
    }

    /// Whether the tables allow a read and a write: SDM section "Determination of Access Rights".
    fn check_write(&self) -> Option<()> {
        let Rights { user, write_protect, smap, .. } = self.rights;
        let user_page = self.permitted & USER != 0;
        if user && !user_page || !user && smap && user_page {
            return None;
        }
        if self.permitted & WRITABLE == 0 && (user || write_protect) {
            return None;
        }
        Some(())
    }

    /// Whether they allow an instruction fetch.
    fn can_fetch(&self) -> bool {
        let Rights { user, smep, .. } = self.rights;
        let user_page = self.permitted & USER != 0;
        self.forbidden == 0 && if user { user_page } else { !(smep && user_page) }
    }
}

fn low_bits(count: u32) -> u64 {
    1u64.checked_shl(count).map_or(u64::MAX, |bit| bit - 1)
}
