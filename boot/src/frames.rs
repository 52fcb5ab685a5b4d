//! Physical memory for what the loader makes, and the memory map that the kernel gets to see.

use arrayvec::ArrayVec;
use bootloader_api::info::{MemoryRegion, MemoryRegionKind};
use x86_64::PhysAddr;

use crate::{
    Error, PAGE,
    memory_map::{BOOT_SERVICES, MAX_REGIONS, MemoryMap},
};

/// Hands out memory from the usable regions, each from its lowest address upwards, and never takes
/// any back: what was given out of a region is one range, and the final map follows from that.
pub struct Frames {
    pools: ArrayVec<Pool, MAX_REGIONS>,
}

/// `region.start <= first <= next <= end <= region.end`; `first..next` is given out, `next..end`
/// can be. `first == end` for a region from which nothing may be taken.
struct Pool {
    region: MemoryRegion,
    first: u64,
    next: u64,
    end: u64,
}

impl Frames {
    /// Everything usable in `map` from `floor` up to `ceiling`, both multiples of the page size.
    pub fn new(map: &MemoryMap, floor: PhysAddr, ceiling: PhysAddr) -> Self {
        let pool = |&region: &MemoryRegion| {
            let clamp = |bound: u64| {
                bound.clamp(floor.as_u64(), ceiling.as_u64()).clamp(region.start, region.end)
            };
            let (first, end) = match region.kind {
                MemoryRegionKind::Usable => (clamp(region.start), clamp(region.end)),
                _ => (region.start, region.start),
            };
            Pool { region, first, next: first, end }
        };
        Self { pools: map.regions().iter().map(pool).collect() }
    }

    /// A page-aligned piece of `bytes` bytes, rounded up to whole pages, contents undefined. `what`
    /// names the purpose in the error.
    pub fn allocate(&mut self, bytes: u64, what: &'static str) -> Result<PhysAddr, Error> {
        self.allocate_aligned(bytes, PAGE, what)
    }

    /// The same at a multiple of `align`, a power of two, at least a page. What is skipped for that
    /// counts as given out.
    pub fn allocate_aligned(
        &mut self,
        bytes: u64,
        align: u64,
        what: &'static str,
    ) -> Result<PhysAddr, Error> {
        let size = bytes.checked_next_multiple_of(PAGE).unwrap_or(u64::MAX);
        let place = |pool: &Pool| {
            let start = pool.next.next_multiple_of(align);
            start.checked_add(size).filter(|end| *end <= pool.end).map(|end| (start, end))
        };
        match self.pools.iter_mut().find_map(|pool| place(pool).map(|at| (pool, at))) {
            Some((pool, (start, end))) => {
                pool.next = end;
                Ok(PhysAddr::new(start))
            }
            None => {
                let largest = self.pools.iter().map(|p| p.end - p.next).max().unwrap_or(0);
                Err(Error::NoMemory { what, bytes, largest })
            }
        }
    }

    /// An upper bound of how many regions [`Self::regions`] will ever yield.
    pub fn max_regions(&self) -> usize {
        3 * self.pools.len()
    }

    /// The memory map for the kernel: what was given out is [`MemoryRegionKind::Bootloader`], and what
    /// the firmware needed for itself is free.
    pub fn regions(&self) -> impl Iterator<Item = MemoryRegion> {
        let parts = |pool: &Pool| {
            let kind = match pool.region.kind {
                kind if BOOT_SERVICES.contains(&kind) => MemoryRegionKind::Usable,
                kind => kind,
            };
            [
                MemoryRegion { start: pool.region.start, end: pool.first, kind },
                MemoryRegion {
                    start: pool.first,
                    end: pool.next,
                    kind: MemoryRegionKind::Bootloader,
                },
                MemoryRegion { start: pool.next, end: pool.region.end, kind },
            ]
        };
        self.pools.iter().flat_map(parts).filter(|r| r.start < r.end)
    }
}

#[cfg(test)]
mod tests {
    use MemoryRegionKind::{Bootloader, UnknownBios, Usable};

    use super::*;
    use crate::memory_map::E820Entry;

    fn frames(entries: &[(u64, u64, u32)], floor: u64, ceiling: u64) -> Frames {
        let reported: Vec<MemoryRegion> = entries
            .iter()
            .map(|&(start, len, kind)| E820Entry { start, len, kind }.into())
            .collect();
        let map = MemoryMap::new(&reported).unwrap();
        Frames::new(&map, PhysAddr::new(floor), PhysAddr::new(ceiling))
    }

    fn regions(frames: &Frames) -> Vec<(u64, u64, MemoryRegionKind)> {
        frames.regions().map(|r| (r.start, r.end, r.kind)).collect()
    }

    #[test]
    fn gives_out_from_the_floor_and_marks_it() {
        let mut frames =
            frames(&[(0, 0x8_0000, 1), (0x8_0000, 0x1000, 2)], 0x1_0000, 0x1_0000_0000);
        assert_eq!(frames.allocate(1, "a").unwrap().as_u64(), 0x1_0000);
        assert_eq!(frames.allocate(0x1001, "b").unwrap().as_u64(), 0x1_1000);
        let expected = [
            (0, 0x1_0000, Usable),
            (0x1_0000, 0x1_3000, Bootloader),
            (0x1_3000, 0x8_0000, Usable),
            (0x8_0000, 0x8_1000, UnknownBios(2)),
        ];
        assert_eq!(regions(&frames), expected);
        assert!(expected.len() <= frames.max_regions());
    }

    #[test]
    fn goes_round_a_hole_and_comes_back_for_small_pieces() {
        let entries = [(0x10_0000, 0x4000, 1), (0x20_0000, 0x10_0000, 1)];
        let mut frames = frames(&entries, 0x10_0000, 1 << 32);
        assert_eq!(frames.allocate(0x8000, "big").unwrap().as_u64(), 0x20_0000);
        assert_eq!(frames.allocate(0x4000, "small").unwrap().as_u64(), 0x10_0000);
        assert_eq!(frames.allocate(0x1000, "more").unwrap().as_u64(), 0x20_8000);
        let expected = [
            (0x10_0000, 0x10_4000, Bootloader),
            (0x20_0000, 0x20_9000, Bootloader),
            (0x20_9000, 0x30_0000, Usable),
        ];
        assert_eq!(regions(&frames), expected);
    }

    #[test]
    fn never_above_the_ceiling() {
        let entries = [(0xffff_f000, 0x3000, 1)];
        let mut frames = frames(&entries, 0x10_0000, 0x1_0000_0000);
        assert_eq!(frames.allocate(0x1000, "page").unwrap().as_u64(), 0xffff_f000);
        let refused = frames.allocate(0x1000, "second page").unwrap_err();
        assert_eq!(refused, Error::NoMemory { what: "second page", bytes: 0x1000, largest: 0 });
        let expected =
            [(0xffff_f000, 0x1_0000_0000, Bootloader), (0x1_0000_0000, 0x1_0000_2000, Usable)];
        assert_eq!(regions(&frames), expected);
    }

    #[test]
    fn alignment_counts_as_given_out() {
        let mut frames = frames(&[(0x1000, 0x9000, 1), (0x10_0000, 0x10_0000, 1)], 0, 1 << 32);
        assert_eq!(frames.allocate_aligned(1, 0x4000, "a").unwrap().as_u64(), 0x4000);
        assert_eq!(frames.allocate_aligned(0x2000, 0x4000, "b").unwrap().as_u64(), 0x8000);
        assert_eq!(frames.allocate_aligned(1, 0x4000, "c").unwrap().as_u64(), 0x10_0000);
        let refused = frames.allocate_aligned(1, 1 << 22, "d").unwrap_err();
        assert_eq!(refused, Error::NoMemory { what: "d", bytes: 1, largest: 0xf_f000 });
        let expected = [
            (0x1000, 0xa000, Bootloader),
            (0x10_0000, 0x10_1000, Bootloader),
            (0x10_1000, 0x20_0000, Usable),
        ];
        assert_eq!(regions(&frames), expected);
    }

    #[test]
    fn what_is_still_the_firmwares_is_not_given_out_but_free_for_the_kernel() {
        use MemoryRegionKind::UnknownUefi;
        let region =
            |page: u64, kind| MemoryRegion { start: page * PAGE, end: (page + 1) * PAGE, kind };
        let kinds = [UnknownUefi(3), UnknownUefi(4), Usable, UnknownUefi(2)];
        let reported: Vec<_> = (0..).zip(kinds).map(|(page, kind)| region(page, kind)).collect();
        let map = MemoryMap::new(&reported).unwrap();
        let mut frames = Frames::new(&map, PhysAddr::zero(), PhysAddr::new(1 << 32));
        assert_eq!(frames.allocate(1, "a").unwrap().as_u64(), 2 * PAGE);
        assert!(frames.allocate(1, "b").is_err());
        let expected = [Usable, Usable, Bootloader, UnknownUefi(2)];
        assert_eq!(frames.regions().map(|r| r.kind).collect::<Vec<_>>(), expected);
    }

    #[test]
    fn absurd_sizes_are_refused() {
        let mut frames = frames(&[(0x10_0000, 0x4000, 1)], 0, 1 << 32);
        for bytes in [0x4001, u64::MAX, u64::MAX - 4095] {
            let refused = frames.allocate(bytes, "x").unwrap_err();
            assert_eq!(refused, Error::NoMemory { what: "x", bytes, largest: 0x4000 });
        }
    }
}
