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

const PRESENT: u64 = 1;
const LARGE: u64 = 1 << 7;
const ADDRESS: u64 = 0x000f_ffff_ffff_f000;

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

fn entry32(memory: &impl GuestRead, address: u64) -> Option<u64> {
    let mut bytes = [0; 4];
    memory.read(GuestPhysAddr::new(address)?, &mut bytes).then_some(())?;
    let entry = u64::from(u32::from_le_bytes(bytes));
    (entry & PRESENT != 0).then_some(entry)
}

#[cfg(test)]
mod tests {
    use super::*;
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
}
