//! The guest's own page tables, walked in software to read instruction bytes.
//!
//! Source: SDM volume 3, chapter "Paging". The walk answers where a linear address lies; it
//! checks presence, not permissions, and leaves accessed and dirty bits alone, because nothing is
//! done in the guest's name with what it finds.

use crate::addr::GuestPhysAddr;

/// Guest memory, as the walk reads it.
pub trait GuestRead {
    /// Copies from `gpa` into `buffer`; false when some of it is not guest memory.
    fn read(&self, gpa: GuestPhysAddr, buffer: &mut [u8]) -> bool;

    /// Reads a 64-bit word that does not cross a page; `None` when it is not guest memory.
    fn read_u64(&self, gpa: GuestPhysAddr) -> Option<u64> {
        let mut bytes = [0; 8];
        self.read(gpa, &mut bytes).then_some(u64::from_le_bytes(bytes))
    }
}

/// Guest memory that can be written too.
pub trait GuestWrite: GuestRead {
    /// Copies `bytes` to `gpa`; false, and nothing written, when some of it is not guest memory.
    fn write(&self, gpa: GuestPhysAddr, bytes: &[u8]) -> bool;
}

/// How the guest translates linear addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Paging {
    /// CR0.PG is 0.
    Off,
    /// Two levels of 32-bit entries; with CR4.PSE, 4-MiB pages.
    Bits32 {
        /// CR4.PSE.
        page_size_extensions: bool,
    },
    /// The four PDPTEs that the CPU holds, then two levels of 64-bit entries.
    Pae,
    /// Four levels of 64-bit entries.
    FourLevel,
}

pub(crate) const PRESENT: u64 = 1;
pub(crate) const LARGE: u64 = 1 << 7;
pub(crate) const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

/// The guest-physical address behind `linear`; `None` where nothing is present.
///
/// `pdptes` are used in PAE mode only: SDM section "PDPTE Registers".
pub fn translate(
    memory: &impl GuestRead,
    paging: Paging,
    cr3: u64,
    pdptes: [u64; 4],
    linear: u64,
) -> Option<GuestPhysAddr> {
    match paging {
        Paging::Off => GuestPhysAddr::new(linear & 0xffff_ffff),
        Paging::Bits32 { page_size_extensions } => {
            let pde = entry32(memory, (cr3 & 0xffff_f000) + (linear >> 22 & 0x3ff) * 4)?;
            if pde & LARGE != 0 && page_size_extensions {
                // PSE-36: bits 20:13 of the entry are address bits 39:32.
                let high = (pde >> 13 & 0xff) << 32;
                return GuestPhysAddr::new(high | pde & 0xffc0_0000 | linear & 0x3f_ffff);
            }
            let pte = entry32(memory, (pde & 0xffff_f000) + (linear >> 12 & 0x3ff) * 4)?;
            GuestPhysAddr::new(pte & 0xffff_f000 | linear & 0xfff)
        }
        Paging::Pae => {
            let pdpte = pdptes[(linear >> 30 & 3) as usize];
            (pdpte & PRESENT != 0).then_some(())?;
            walk64(memory, pdpte & ADDRESS, 1, linear)
        }
        Paging::FourLevel => walk64(memory, cr3 & ADDRESS, 3, linear),
    }
}

fn walk64(memory: &impl GuestRead, root: u64, top: u32, linear: u64) -> Option<GuestPhysAddr> {
    let mut table = root;
    for level in (0..=top).rev() {
        let index = linear >> (12 + 9 * level) & 0x1ff;
        let entry = memory.read_u64(GuestPhysAddr::new_truncate(table + index * 8))?;
        (entry & PRESENT != 0).then_some(())?;
        if level == 0 || level < 3 && entry & LARGE != 0 {
            let offset = (4096u64 << (9 * level)) - 1;
            return GuestPhysAddr::new(entry & ADDRESS & !offset | linear & offset);
        }
        table = entry & ADDRESS;
    }
    None
}

/// The 32-bit entry at `address`, if it is in the guest's memory and present.
pub(crate) fn entry32(memory: &impl GuestRead, address: u64) -> Option<u64> {
    let mut bytes = [0; 4];
    memory.read(GuestPhysAddr::new(address)?, &mut bytes).then_some(())?;
    let entry = u64::from(u32::from_le_bytes(bytes));
    (entry & PRESENT != 0).then_some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;
    use std::{vec, vec::Vec};

    struct Flat(Vec<u8>);
    impl Flat {
        fn put(&mut self, at: usize, bytes: &[u8]) {
            self.0[at..at + bytes.len()].copy_from_slice(bytes);
        }
    }
    impl GuestRead for Flat {
        fn read(&self, gpa: GuestPhysAddr, buffer: &mut [u8]) -> bool {
            let start = gpa.as_u64() as usize;
            let Some(source) = self.0.get(start..start.saturating_add(buffer.len())) else {
                return false;
            };
            buffer.copy_from_slice(source);
            true
        }
    }

    fn at(memory: &Flat, paging: Paging, cr3: u64, linear: u64) -> Option<u64> {
        let pdptes = [0x2001, 0, 0, 0];
        translate(memory, paging, cr3, pdptes, linear).map(GuestPhysAddr::as_u64)
    }

    #[test]
    fn four_level() {
        let mut memory = Flat(vec![0; 0x6000]);
        memory.put(0x1008, &0x2003u64.to_le_bytes()); // PML4[1]
        memory.put(0x2010, &0x3003u64.to_le_bytes()); // PDPT[2]
        memory.put(0x2018, &0x4000_0083u64.to_le_bytes()); // PDPT[3]: 1 GiB
        memory.put(0x3008, &0x4003u64.to_le_bytes()); // PD[1]
        memory.put(0x3010, &0x0060_0083u64.to_le_bytes()); // PD[2]: 2 MiB
        memory.put(0x4028, &0x7003u64.to_le_bytes()); // PT[5]
        let base = 1u64 << 39;
        let walk = |linear| at(&memory, Paging::FourLevel, 0x1000, base | linear);
        assert_eq!(walk(2 << 30 | 1 << 21 | 5 << 12 | 0x12), Some(0x7012));
        assert_eq!(walk(2 << 30 | 2 << 21 | 0x1_2345), Some(0x61_2345));
        assert_eq!(walk(3 << 30 | 0x123_4567), Some(0x4123_4567));
        assert_eq!(walk(2 << 30 | 1 << 21 | 6 << 12), None);
        assert_eq!(walk(0), None);
        // Tables outside the guest's memory.
        assert_eq!(at(&memory, Paging::FourLevel, 0xffff_f000, 0), None);
    }

    #[test]
    fn pae_and_32_bit() {
        let mut memory = Flat(vec![0; 0x6000]);
        memory.put(0x2000, &0x3001u64.to_le_bytes());
        memory.put(0x3008, &0x5001u64.to_le_bytes());
        assert_eq!(at(&memory, Paging::Pae, 0, 0x1abc), Some(0x5abc));
        assert_eq!(at(&memory, Paging::Pae, 0, 0x4000_0000), None);

        memory.put(0x1000, &0x3001u32.to_le_bytes());
        memory.put(0x1004, &0x0080_0081u32.to_le_bytes());
        let pse = Paging::Bits32 { page_size_extensions: true };
        assert_eq!(at(&memory, pse, 0x1000, 0x2abc), Some(0x5abc));
        assert_eq!(at(&memory, pse, 0x1000, 0x0040_1234), Some(0x0080_1234));
        assert_eq!(at(&memory, Paging::Off, 0x1000, 0x1234), Some(0x1234));
    }
    /// Guest page tables from a list of pages, built without the walk's arithmetic: a table is
    /// found by the part of the linear address that it stands for.
    struct Builder {
        memory: Flat,
        tables: BTreeMap<(u32, u64), u64>,
        /// Lowest linear address bit that each level's index has, the root's first.
        shifts: &'static [u32],
        entry_bytes: usize,
        /// Whether bit 7 above the last level makes a page.
        has_large: bool,
        noise: u64,
    }

    const ROOT: u64 = 0x1000;

    impl Builder {
        fn new(paging: Paging, shifts: &'static [u32], noise: u64) -> Self {
            let entry_bytes = if matches!(paging, Paging::Bits32 { .. }) { 4 } else { 8 };
            let has_large = paging != Paging::Bits32 { page_size_extensions: false };
            let memory = Flat(vec![0; 0x2000]);
            Self { memory, tables: BTreeMap::new(), shifts, entry_bytes, has_large, noise }
        }

        /// Bits that do not matter to where an address lies, present set.
        fn flags(&mut self) -> u64 {
            self.noise = self.noise.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
            // R/W, U/S, PWT, PCD, A, D, and bits that are software's; in 64-bit entries NX too.
            let wide = if self.entry_bytes == 8 { 0x87f0_0000_0000_0000 } else { 0 };
            1 | self.noise.rotate_right(17) & (0xe7e | wide) & !(1 << 7)
        }

        fn put(&mut self, table: u64, linear: u64, shift: u32, entry: u64) {
            let entries = 4096 / self.entry_bytes as u64;
            let at = table + (linear >> shift) % entries * self.entry_bytes as u64;
            let bytes = entry.to_le_bytes();
            self.memory.put(at as usize, &bytes[..self.entry_bytes]);
        }

        /// Maps `linear` to `target` by a page whose entry is of the level with this index.
        fn map(&mut self, linear: u64, target: u64, level: usize) {
            let mut table = ROOT;
            for &shift in &self.shifts[..level] {
                let next = match self.tables.get(&(shift, linear >> shift)) {
                    Some(next) => *next,
                    None => {
                        let next = self.memory.0.len() as u64;
                        self.memory.0.resize(next as usize + 4096, 0);
                        self.tables.insert((shift, linear >> shift), next);
                        let bit_7 = if self.has_large { 0 } else { self.noise & LARGE };
                        let entry = next | self.flags() | bit_7;
                        // PDPTEs have neither R/W nor NX, and bits 2:1 and 8:5 reserved.
                        let pdpte = self.shifts[0] == 30 && shift == 30;
                        self.put(table, linear, shift, if pdpte { next | 0x19 } else { entry });
                        next
                    }
                };
                table = next;
            }
            let shift = self.shifts[level];
            let large = level + 1 < self.shifts.len();
            // PAT is bit 12 of a large page, bit 7 of a small one.
            let (size, pat) = if large { (LARGE, 1 << 12) } else { (0, 1 << 7) };
            let address = if self.entry_bytes == 4 && large {
                target & 0xffff_ffff | (target >> 32) << 13
            } else {
                target
            };
            let entry = address | self.flags() | size | self.noise & pat;
            self.put(table, linear, shift, entry);
        }
    }

    /// A page: where in linear memory, the level of its entry, where in guest memory.
    type Pages = Vec<([u64; 4], usize, u64)>;

    fn pages() -> impl Strategy<Value = Pages> {
        let index = || prop::sample::select(vec![0u64, 1, 255, 510, 511, 1023]);
        let page = ([index(), index(), index(), index()], 0usize..4, any::<u64>());
        prop::collection::vec(page, 1..12)
    }

    /// Builds tables of these pages, skipping those that overlap; then each of them is found, at
    /// each of its ends and in between, and what no page holds is not.
    fn check(
        pages: &Pages,
        noise: u64,
        paging: Paging,
        shifts: &'static [u32],
        width: u32,
    ) -> Result<(), TestCaseError> {
        let mut builder = Builder::new(paging, shifts, noise);
        let mut mapped: Vec<(u64, u64, u64)> = Vec::new();
        // Neither a PML4E nor a PDPTE of PAE paging maps a page.
        let large_from =
            if matches!(paging, Paging::Bits32 { page_size_extensions: true }) { 0 } else { 1 };
        let linears = |indices: &[u64; 4]| {
            let spread = shifts.iter().zip(indices).fold(0, |all, (shift, i)| all | i << shift);
            spread & ((1 << width) - 1)
        };
        for (indices, level, target) in pages {
            let level = (*level).clamp(large_from, shifts.len() - 1);
            let bytes = 1u64 << shifts[level];
            let linear = linears(indices) & !(bytes - 1);
            let physical = match (builder.entry_bytes, level + 1 == shifts.len()) {
                (8, _) => 52,
                (_, true) => 32,
                (_, false) => 40,
            };
            let target = target & ((1 << physical) - 1) & !(bytes - 1);
            let free = |(start, _, size): &(u64, u64, u64)| {
                linear + bytes <= *start || start + size <= linear
            };
            if mapped.iter().all(free) {
                builder.map(linear, target, level);
                mapped.push((linear, target, bytes));
            }
        }
        let mut pdptes = [0; 4];
        for (index, pdpte) in pdptes.iter_mut().enumerate() {
            let at = ROOT as usize + index * 8;
            *pdpte = u64::from_le_bytes(builder.memory.0[at..at + 8].try_into().unwrap());
        }
        // PCID, or PWT and PCD.
        let cr3 = ROOT | noise & 0x18;
        let walk = |linear| {
            translate(&builder.memory, paging, cr3, pdptes, linear).map(GuestPhysAddr::as_u64)
        };
        for (start, target, bytes) in &mapped {
            for offset in [0, 1, noise % bytes, bytes - 1] {
                prop_assert_eq!(walk(start + offset), Some(target + offset));
            }
        }
        for (indices, ..) in pages {
            for linear in [linears(indices), linears(indices) ^ (1 << shifts[shifts.len() - 1])] {
                let holds = |(start, _, bytes): &&(u64, u64, u64)| {
                    (*start..start + bytes).contains(&linear)
                };
                let expected = mapped.iter().find(holds).map(|(start, to, _)| to + linear - start);
                prop_assert_eq!(walk(linear), expected, "{:#x}", linear);
            }
        }
        Ok(())
    }

    /// Memory whose every byte is arbitrary, with holes.
    struct Garbage(u64);
    impl GuestRead for Garbage {
        fn read(&self, gpa: GuestPhysAddr, buffer: &mut [u8]) -> bool {
            for (at, byte) in (gpa.as_u64()..).zip(&mut *buffer) {
                *byte = ((at ^ self.0).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 53) as u8;
            }
            (gpa.as_u64() ^ self.0).wrapping_mul(0xff51_afd7_ed55_8ccd) >> 60 != 0
        }
    }

    fn paging() -> impl Strategy<Value = Paging> {
        prop::sample::select(vec![
            Paging::Off,
            Paging::Bits32 { page_size_extensions: false },
            Paging::Bits32 { page_size_extensions: true },
            Paging::Pae,
            Paging::FourLevel,
        ])
    }

    proptest! {
        #[test]
        fn built_tables_are_walked(pages in pages(), noise: u64) {
            check(&pages, noise, Paging::FourLevel, &[39, 30, 21, 12], 48)?;
            check(&pages, noise, Paging::Pae, &[30, 21, 12], 32)?;
            for page_size_extensions in [false, true] {
                check(&pages, noise, Paging::Bits32 { page_size_extensions }, &[22, 12], 32)?;
            }
        }

        #[test]
        fn garbage_leads_to_an_address_or_to_nothing(
            seed: u64,
            paging in paging(),
            cr3: u64,
            pdptes: [u64; 4],
            linear: u64,
        ) {
            if let Some(gpa) = translate(&Garbage(seed), paging, cr3, pdptes, linear) {
                prop_assert_eq!(gpa.as_u64() & 0xfff, linear & 0xfff);
                prop_assert_eq!(gpa.as_u64() >> 52, 0);
            }
        }
    }
}
