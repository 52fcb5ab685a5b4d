//! The physical memory map: from whatever the firmware says to sorted, disjoint regions.

use arrayvec::ArrayVec;
use bootloader_api::info::{MemoryRegion, MemoryRegionKind};

use crate::{Error, PAGE};

/// How many regions a [`MemoryMap`] can hold. Firmware of large machines reports hundreds.
pub const MAX_REGIONS: usize = 1024;

/// How many entries, possibly overlapping, a firmware may report: a boundary at each end of each
/// makes at most two regions.
pub const MAX_ENTRIES: usize = MAX_REGIONS / 2;

/// Types of UEFI memory that are the firmware's until it has given the machine away, and free from
/// then on: code and data of its boot services (UEFI specification, "Memory Type Usage after
/// ExitBootServices()").
pub const BOOT_SERVICES: [MemoryRegionKind; 2] =
    [MemoryRegionKind::UnknownUefi(3), MemoryRegionKind::UnknownUefi(4)];

/// Types of UEFI memory that are devices: ports and registers, not memory.
const UEFI_DEVICES: [MemoryRegionKind; 2] =
    [MemoryRegionKind::UnknownUefi(11), MemoryRegionKind::UnknownUefi(12)];

/// One above the highest physical address that page tables can hold (Intel SDM volume 3, "4-Level
/// Paging and 5-Level Paging": 52 bits).
const PHYSICAL_END: u64 = 1 << 52;

/// An address range descriptor of INT 15h E820h (ACPI specification, "System Address Map
/// Interfaces").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct E820Entry {
    /// First byte.
    pub start: u64,
    /// Size in bytes.
    pub len: u64,
    /// Address range type; 1 is memory free for use.
    pub kind: u32,
}

impl From<E820Entry> for MemoryRegion {
    fn from(entry: E820Entry) -> Self {
        Self {
            start: entry.start,
            end: entry.start.saturating_add(entry.len),
            kind: match entry.kind {
                1 => MemoryRegionKind::Usable,
                other => MemoryRegionKind::UnknownBios(other),
            },
        }
    }
}

/// Sorted, disjoint, non-empty regions. Usable ones consist of whole pages; between regions there
/// can be holes, about which the firmware said nothing.
#[derive(Clone, Debug)]
pub struct MemoryMap {
    regions: ArrayVec<MemoryRegion, MAX_REGIONS>,
}

impl MemoryMap {
    /// Makes a map of `reported` regions in any order, overlapping or empty, at any byte boundary.
    /// Where regions overlap, being usable is the weakest claim, and of the others the larger type
    /// number wins (as Linux resolves it, `arch/x86/kernel/e820.c`).
    pub fn new(reported: &[MemoryRegion]) -> Result<Self, Error> {
        let mut bounds = ArrayVec::<u64, { 2 * MAX_ENTRIES }>::new();
        for region in reported {
            for bound in [region.start, region.end] {
                bounds.try_push(bound.min(PHYSICAL_END)).map_err(|_| Error::TooManyRegions)?;
            }
        }
        bounds.sort_unstable();

        let mut map = Self { regions: ArrayVec::new() };
        for pair in bounds.windows(2) {
            let (start, end) = (pair[0], pair[1]);
            let kind = reported
                .iter()
                .filter(|r| r.start <= start && end <= r.end)
                .map(|r| r.kind)
                .max_by_key(|kind| strength(*kind));
            if let Some(kind) = kind
                && start < end
            {
                map.append(start, end, kind)?;
            }
        }
        for region in &mut map.regions {
            if region.kind == MemoryRegionKind::Usable {
                region.start = region.start.next_multiple_of(PAGE);
                region.end -= region.end % PAGE;
            }
        }
        map.regions.retain(|r| r.start < r.end);
        Ok(map)
    }

    fn append(&mut self, start: u64, end: u64, kind: MemoryRegionKind) -> Result<(), Error> {
        if let Some(last) = self.regions.last_mut()
            && last.end == start
            && last.kind == kind
        {
            last.end = end;
            return Ok(());
        }
        let region = MemoryRegion { start, end, kind };
        self.regions.try_push(region).map_err(|_| Error::TooManyRegions)
    }

    /// The regions, by ascending address.
    pub fn regions(&self) -> &[MemoryRegion] {
        &self.regions
    }

    /// One above the highest address of any region that is not known to be a device, which can be far
    /// above all memory; 0 for an empty map.
    pub fn end(&self) -> u64 {
        let memory = self.regions.iter().rev().find(|r| !UEFI_DEVICES.contains(&r.kind));
        memory.map_or(0, |r| r.end)
    }

    /// Whether `start..end` lies in one region, or in none: no boundary falls inside.
    pub fn is_uniform(&self, start: u64, end: u64) -> bool {
        let inside = |bound| start < bound && bound < end;
        !self.regions.iter().any(|r| inside(r.start) || inside(r.end))
    }
}

/// Which claim on an address wins: the greater.
fn strength(kind: MemoryRegionKind) -> u64 {
    match kind {
        MemoryRegionKind::Usable => 0,
        MemoryRegionKind::Bootloader => 1,
        MemoryRegionKind::UnknownBios(n) | MemoryRegionKind::UnknownUefi(n) => 2 + u64::from(n),
        _ => u64::MAX,
    }
}

#[cfg(test)]
mod tests {
    use MemoryRegionKind::{UnknownBios, Usable};

    use super::*;

    fn map(entries: &[(u64, u64, u32)]) -> Vec<(u64, u64, MemoryRegionKind)> {
        let reported: Vec<MemoryRegion> = entries
            .iter()
            .map(|&(start, len, kind)| E820Entry { start, len, kind }.into())
            .collect();
        let map = MemoryMap::new(&reported).unwrap();
        map.regions().iter().map(|r| (r.start, r.end, r.kind)).collect()
    }

    #[test]
    fn sorts_and_merges() {
        let found = map(&[
            (0x10_0000, 0x10_0000, 1),
            (0xf_0000, 0x1_0000, 2),
            (0, 0x9_f000, 1),
            (0x20_0000, 0x10_0000, 1),
        ]);
        let expected = [
            (0, 0x9_f000, Usable),
            (0xf_0000, 0x10_0000, UnknownBios(2)),
            (0x10_0000, 0x30_0000, Usable),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn overlaps_go_to_the_stronger_claim() {
        let found = map(&[(0x1000, 0x9000, 1), (0x3000, 0x2000, 3), (0x4000, 0x3000, 4)]);
        let expected = [
            (0x1000, 0x3000, Usable),
            (0x3000, 0x4000, UnknownBios(3)),
            (0x4000, 0x7000, UnknownBios(4)),
            (0x7000, 0xa000, Usable),
        ];
        assert_eq!(found, expected);
        // The same with the claims in the opposite order.
        assert_eq!(map(&[(0x4000, 0x3000, 4), (0x3000, 0x2000, 3), (0x1000, 0x9000, 1)]), expected);
    }

    #[test]
    fn duplicates_empty_and_wrapping_entries() {
        let found = map(&[
            (0x1000, 0x1000, 1),
            (0x1000, 0x1000, 1),
            (0x5000, 0, 1),
            (0xffff_ffff_ffff_f000, 0x2000, 2),
            (0xf_ffff_ffff_f000, u64::MAX, 2),
        ]);
        let expected =
            [(0x1000, 0x2000, Usable), (0xf_ffff_ffff_f000, 0x10_0000_0000_0000, UnknownBios(2))];
        assert_eq!(found, expected);
    }

    #[test]
    fn usable_memory_is_trimmed_to_pages_and_reserved_is_not() {
        let found = map(&[(0x1001, 0x3800, 1), (0x8010, 0x20, 2), (0x9001, 0xffe, 1)]);
        assert_eq!(found, [(0x2000, 0x4000, Usable), (0x8010, 0x8030, UnknownBios(2))]);
    }

    #[test]
    fn adjacent_usable_entries_that_meet_inside_a_page_keep_that_page() {
        assert_eq!(map(&[(0x1000, 0x1800, 1), (0x2800, 0x1800, 1)]), [(0x1000, 0x4000, Usable)]);
    }

    #[test]
    fn terabytes() {
        let found = map(&[(0x1_0000_0000, 12 << 40, 1), (0xfd_0000_0000, 0x3_0000_0000, 2)]);
        let expected = [
            (0x1_0000_0000, 0xfd_0000_0000, Usable),
            (0xfd_0000_0000, 0x100_0000_0000, UnknownBios(2)),
            (0x100_0000_0000, 0x1_0000_0000 + (12 << 40), Usable),
        ];
        assert_eq!(found, expected);
    }

    #[test]
    fn devices_far_above_do_not_count_as_memory() {
        let region = |start, end, kind| MemoryRegion { start, end, kind };
        let reported = [
            region(0x10_0000, 0x8000_0000, Usable),
            region(0x38_0000_0000, 0x39_0000_0000, MemoryRegionKind::UnknownUefi(0)),
            region(0x3800_0000_0000, 0x3900_0000_0000, MemoryRegionKind::UnknownUefi(11)),
        ];
        assert_eq!(MemoryMap::new(&reported).unwrap().end(), 0x39_0000_0000);
        assert_eq!(MemoryMap::new(&reported[2..]).unwrap().end(), 0);
    }

    #[test]
    fn uniform_means_no_boundary_inside() {
        let reported = [(0x1000, 0x3000, 1), (0x4000, 0x1000, 2)]
            .map(|(start, len, kind)| E820Entry { start, len, kind }.into());
        let map = MemoryMap::new(&reported).unwrap();
        assert!(map.is_uniform(0x1000, 0x4000));
        assert!(map.is_uniform(0x2000, 0x3000));
        assert!(map.is_uniform(0x5000, 0x8000));
        assert!(!map.is_uniform(0x3000, 0x5000));
        assert!(!map.is_uniform(0, 0x2000));
        assert!(!map.is_uniform(0, 0x10000));
    }

    #[test]
    fn as_many_entries_as_promised_and_no_more() {
        let entry = |i: usize| E820Entry {
            start: i as u64 * 0x4000,
            len: 0x2000,
            kind: 1 + (i % 2) as u32,
        };
        let mut reported: Vec<MemoryRegion> = (0..MAX_ENTRIES).map(|i| entry(i).into()).collect();
        assert_eq!(MemoryMap::new(&reported).unwrap().regions().len(), MAX_ENTRIES);
        reported.push(entry(MAX_ENTRIES).into());
        assert_eq!(MemoryMap::new(&reported).unwrap_err(), Error::TooManyRegions);
        // The worst case: all nested, so that every boundary starts a region.
        let nested: Vec<MemoryRegion> = (0..MAX_ENTRIES as u64)
            .map(|i| E820Entry {
                start: i * 0x1000,
                len: (2 * MAX_ENTRIES as u64 - 2 * i) * 0x1000,
                kind: 2 + i as u32,
            })
            .map(MemoryRegion::from)
            .collect();
        assert_eq!(MemoryMap::new(&nested).unwrap().regions().len(), 2 * MAX_ENTRIES - 1);
    }
}
