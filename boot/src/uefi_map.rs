//! The memory map of UEFI firmware, and where the loader puts what shall outlive a restart.

use arrayvec::ArrayVec;
use bootloader_api::info::{MemoryRegion, MemoryRegionKind};

use crate::{Error, PAGE, log, memory_map::MAX_ENTRIES};

/// Memory type: not to be used.
const RESERVED: u32 = 0;

/// Memory type: free.
const CONVENTIONAL: u32 = 7;

/// Attribute: the memory can be cached as memory is.
const WRITE_BACK: u64 = 1 << 3;

/// Attribute: set aside for a purpose that the firmware's maker knows.
const SPECIFIC_PURPOSE: u64 = 1 << 18;

/// What the loader fills lies between these.
const LOW: u64 = 1 << 20;
const HIGH: u64 = 1 << 32;

/// A memory descriptor (UEFI specification, "EFI_BOOT_SERVICES.GetMemoryMap()").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Descriptor {
    /// Memory type.
    pub kind: u32,
    /// Physical address of the first byte.
    pub start: u64,
    /// Size in pages.
    pub pages: u64,
    /// What the memory can do.
    pub attributes: u64,
}

/// The firmware's memory map as far as it is known.
pub type Regions = ArrayVec<MemoryRegion, MAX_ENTRIES>;

/// The regions of a map. Adjacent ones of one kind are put together, as firmware splits them by
/// attributes that do not matter here. The first page is reserved: nothing good comes from memory at
/// the address 0.
pub fn regions(descriptors: impl IntoIterator<Item = Descriptor>) -> Result<Regions, Error> {
    let first = MemoryRegion { start: 0, end: PAGE, kind: MemoryRegionKind::UnknownUefi(RESERVED) };
    let mut regions = Regions::new();
    regions.push(first);
    for Descriptor { kind, start, pages, attributes } in descriptors {
        let end = start.saturating_add(pages.saturating_mul(PAGE));
        let start = start.max(PAGE);
        let plain = attributes & (WRITE_BACK | SPECIFIC_PURPOSE) == WRITE_BACK;
        let kind = match kind {
            CONVENTIONAL if plain => MemoryRegionKind::Usable,
            CONVENTIONAL => MemoryRegionKind::UnknownUefi(RESERVED),
            other => MemoryRegionKind::UnknownUefi(other),
        };
        match regions.last_mut() {
            _ if start >= end => {}
            Some(last) if last.end == start && last.kind == kind => last.end = end,
            _ => regions
                .try_push(MemoryRegion { start, end, kind })
                .map_err(|_| Error::TooManyRegions)?,
        }
    }
    Ok(regions)
}

/// The free memory that the loader may fill, as pairs of start and end.
fn free(regions: &[MemoryRegion]) -> impl Iterator<Item = (u64, u64)> {
    regions
        .iter()
        .filter(|region| region.kind == MemoryRegionKind::Usable)
        .map(|region| (region.start.clamp(LOW, HIGH), region.end.clamp(LOW, HIGH)))
}

/// Where `bytes` bytes shall lie that outlive a restart: at a multiple of [`log::ALIGN`], in the
/// middle of the largest free region, since firmware takes its memory from the ends.
pub fn middle(regions: &[MemoryRegion], what: &'static str, bytes: u64) -> Result<u64, Error> {
    let (start, end) = free(regions).max_by_key(|(start, end)| end - start).unwrap_or_default();
    let refuse = Error::NoMemory { what, bytes, largest: end - start };
    let spare = (end - start).checked_sub(bytes).ok_or(refuse)?;
    let at = start + spare / 2;
    let below = at - at % log::ALIGN;
    let above = below + log::ALIGN;
    match () {
        () if below >= start => Ok(below),
        () if above + bytes <= end => Ok(above),
        () => Err(refuse),
    }
}

#[cfg(test)]
mod tests {
    use MemoryRegionKind::{UnknownUefi, Usable};

    use super::*;
    use crate::memory_map::MemoryMap;

    const MIB: u64 = 1 << 20;

    fn conventional(start: u64, bytes: u64) -> Descriptor {
        Descriptor { kind: CONVENTIONAL, start, pages: bytes / PAGE, attributes: 0xf }
    }

    fn made(descriptors: &[Descriptor]) -> Vec<(u64, u64, MemoryRegionKind)> {
        let regions = regions(descriptors.iter().copied()).unwrap();
        regions.iter().map(|r| (r.start, r.end, r.kind)).collect()
    }

    #[test]
    fn only_ordinary_memory_is_free() {
        let odd = |start, attributes| Descriptor { attributes, ..conventional(start, PAGE) };
        let of_kind = |start, kind| Descriptor { kind, ..conventional(start, PAGE) };
        let found = made(&[
            conventional(0x10_0000, 0x2000),
            odd(0x10_2000, 0x1),
            odd(0x10_3000, WRITE_BACK | SPECIFIC_PURPOSE),
            odd(0x10_4000, WRITE_BACK | 1 << 14),
            of_kind(0x10_5000, 4),
            of_kind(0x10_6000, 0x8000_0001),
        ]);
        let expected = [
            (0, 0x1000, UnknownUefi(0)),
            (0x10_0000, 0x10_2000, Usable),
            (0x10_2000, 0x10_4000, UnknownUefi(0)),
            (0x10_4000, 0x10_5000, Usable),
            (0x10_5000, 0x10_6000, UnknownUefi(4)),
            (0x10_6000, 0x10_7000, UnknownUefi(0x8000_0001)),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn the_first_page_is_never_free() {
        let boot_services = Descriptor { kind: 3, ..conventional(0, 0x1000) };
        assert_eq!(made(&[boot_services]), [(0, 0x1000, UnknownUefi(0))]);
        let found = made(&[conventional(0, 0xa_0000)]);
        assert_eq!(found, [(0, 0x1000, UnknownUefi(0)), (0x1000, 0xa_0000, Usable)]);
        let reserved = Descriptor { kind: RESERVED, ..conventional(0, 0x3000) };
        assert_eq!(made(&[reserved]), [(0, 0x3000, UnknownUefi(0))]);
    }

    #[test]
    fn long_maps_fit_once_put_together_and_nonsense_does_no_harm() {
        let split = (0..10_000).map(|i| conventional(MIB + i * PAGE, PAGE));
        assert_eq!(regions(split).unwrap().len(), 2);
        let scattered = (0..MAX_ENTRIES as u64).map(|i| conventional(MIB + 2 * i * PAGE, PAGE));
        assert_eq!(regions(scattered).unwrap_err(), Error::TooManyRegions);
        let endless = Descriptor { pages: u64::MAX, ..conventional(0xffff_f000, 0) };
        assert_eq!(made(&[endless])[1], (0xffff_f000, u64::MAX, Usable));
        assert_eq!(made(&[conventional(MIB, 0)]).len(), 1);
    }

    #[test]
    fn the_middle_is_far_from_both_ends() {
        let regions = regions([
            conventional(MIB, 10 * MIB),
            conventional(16 * MIB, 100 * MIB),
            conventional(1 << 32, 1000 * MIB),
        ])
        .unwrap();
        assert_eq!(middle(&regions, "it", 10 * MIB).unwrap(), (16 + 45) * MIB);
        assert_eq!(middle(&regions, "it", 10 * MIB + 2 * PAGE).unwrap(), (16 + 44) * MIB);
        assert_eq!(middle(&regions, "it", 100 * MIB).unwrap(), 16 * MIB);
        let (bytes, largest) = (100 * MIB + 1, 100 * MIB);
        let refused = middle(&regions, "it", bytes).unwrap_err();
        assert_eq!(refused, Error::NoMemory { what: "it", bytes, largest });
    }

    #[test]
    fn alignment_stays_inside_the_region() {
        let odd = |bytes| regions([conventional(16 * MIB + PAGE, bytes)]).unwrap();
        assert_eq!(middle(&odd(3 * MIB), "it", 2 * MIB).unwrap(), 17 * MIB);
        assert!(middle(&odd(2 * MIB), "it", 2 * MIB - PAGE).is_err());
        assert!(middle(&[], "it", 1).is_err());
    }

    #[test]
    fn a_log_is_looked_for_where_it_is_put() {
        let regions = regions([
            conventional(0, 0xa_0000),
            conventional(16 * MIB + PAGE, 10 * MIB),
            conventional((1 << 32) - 8 * MIB, 20 * MIB),
        ])
        .unwrap();
        let at = middle(&regions, "it", 2 * MIB).unwrap();
        let map = MemoryMap::new(&regions).unwrap();
        assert!(log::places(&map, HIGH).any(|place| place == at + log::OFFSET));
    }
}
