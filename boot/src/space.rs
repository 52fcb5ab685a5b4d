//! The kernel's virtual address space: which ranges are taken, and where the next thing goes.

use core::ops::RangeInclusive;

use arrayvec::ArrayVec;
use bootloader_api::config::{Mapping, Mappings};

use crate::{Error, PAGE, kernel::MAX_SEGMENTS};

/// The addresses that are not canonical with four-level paging (Intel SDM volume 1, "Canonical
/// Addressing"): never anything there.
const HOLE: RangeInclusive<u64> = 0x0000_8000_0000_0000..=0xffff_7fff_ffff_ffff;

/// Where dynamic addresses begin if the kernel does not say: above everything that a kernel linked
/// low or an identity mapping would use, so that near-null pointers fault.
const DYNAMIC_START: u64 = 1 << 40;

/// The last byte that may be used for dynamic addresses if the kernel does not say. The highest
/// page stays free: the end of a range in it could not be expressed.
const DYNAMIC_LAST: u64 = 0xffff_ffff_ffff_efff;

/// Something that needs virtual addresses.
#[derive(Clone, Copy)]
pub struct Request {
    /// What it is, for the error.
    pub what: &'static str,
    /// Where the kernel wants it.
    pub mapping: Mapping,
    /// Its size in bytes; nothing is reserved for 0.
    pub bytes: u64,
    /// Alignment in bytes of an address that the loader chooses, a power of two.
    pub align: u64,
    /// Alignment in bytes that an address chosen by the kernel must have, a power of two.
    pub fixed_align: u64,
}

/// Room for the segments, for one of each kind of request, and for the two ranges never used.
const MAX_RANGES: usize = MAX_SEGMENTS + 16;

/// Ranges in use and the range for dynamic addresses.
pub struct Space {
    used: ArrayVec<RangeInclusive<u64>, MAX_RANGES>,
    dynamic: RangeInclusive<u64>,
}

impl Space {
    /// An empty address space with the dynamic range that `mappings` asks for.
    pub fn new(mappings: &Mappings) -> Self {
        let start = mappings.dynamic_range_start.unwrap_or(DYNAMIC_START);
        let last = mappings.dynamic_range_end.unwrap_or(DYNAMIC_LAST).min(DYNAMIC_LAST);
        let used = [0..=PAGE - 1, HOLE].into_iter().collect();
        Self { used, dynamic: start..=last }
    }

    fn conflict(&self, range: &RangeInclusive<u64>) -> Option<&RangeInclusive<u64>> {
        self.used.iter().find(|used| used.start() <= range.end() && range.start() <= used.end())
    }

    /// Takes the `bytes` (at least 1) bytes at `start`, which must be free.
    pub fn claim(&mut self, what: &'static str, start: u64, bytes: u64) -> Result<(), Error> {
        let refuse = |why| Error::BadAddress { what, address: start, why };
        let last =
            start.checked_add(bytes - 1).ok_or(refuse("it reaches past the last address"))?;
        match self.conflict(&(start..=last)) {
            Some(used) if *used == HOLE => Err(refuse("the address is not canonical")),
            Some(_) => Err(refuse("the address is already in use")),
            None => self.used.try_push(start..=last).map_err(|_| refuse("too many address ranges")),
        }
    }

    /// Takes `bytes` bytes at the lowest free address of the dynamic range.
    fn find(&mut self, what: &'static str, bytes: u64, align: u64) -> Result<u64, Error> {
        let fits = |start: u64| {
            let last = start.checked_add(bytes - 1)?;
            let range = start..=last;
            let free = last <= *self.dynamic.end() && self.conflict(&range).is_none();
            free.then_some(start)
        };
        let after = |used: &RangeInclusive<u64>| {
            used.end().checked_add(1).filter(|start| self.dynamic.contains(start))
        };
        let start = self
            .used
            .iter()
            .filter_map(after)
            .chain([*self.dynamic.start()])
            .filter_map(|start| start.checked_next_multiple_of(align))
            .filter_map(fits)
            .min()
            .ok_or(Error::NoAddressSpace { what, bytes })?;
        self.claim(what, start, bytes)?;
        Ok(start)
    }

    /// Takes the addresses that the kernel fixed. 0 for the other requests, and for those of no
    /// bytes; [`Self::place_others`] fills them in.
    pub fn place_fixed<const N: usize>(
        &mut self,
        requests: &[Request; N],
    ) -> Result<[u64; N], Error> {
        let mut starts = [0; N];
        for (start, request) in starts.iter_mut().zip(requests) {
            if let Mapping::FixedAddress(address) = request.mapping
                && request.bytes > 0
            {
                let Request { what, bytes, fixed_align, .. } = *request;
                if address % fixed_align != 0 {
                    let why = "the address is not aligned as it must be";
                    return Err(Error::BadAddress { what, address, why });
                }
                self.claim(what, address, bytes)?;
                *start = address;
            }
        }
        Ok(starts)
    }

    /// Takes addresses for those `requests` that leave them to the loader, around all that is
    /// taken.
    pub fn place_others<const N: usize>(
        &mut self,
        requests: &[Request; N],
        mut starts: [u64; N],
    ) -> Result<[u64; N], Error> {
        for (start, request) in starts.iter_mut().zip(requests) {
            if request.mapping == Mapping::Dynamic && request.bytes > 0 {
                *start = self.find(request.what, request.bytes, request.align)?;
            }
        }
        Ok(starts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(mapping: Mapping, bytes: u64, align: u64) -> Request {
        Request { what: "it", mapping, bytes, align, fixed_align: PAGE }
    }

    fn fixed(address: u64, bytes: u64) -> Request {
        request(Mapping::FixedAddress(address), bytes, PAGE)
    }

    fn place<const N: usize>(mut space: Space, requests: [Request; N]) -> Result<[u64; N], Error> {
        let fixed = space.place_fixed(&requests)?;
        space.place_others(&requests, fixed)
    }

    fn space(start: Option<u64>, end: Option<u64>) -> Space {
        let mut mappings = Mappings::new_default();
        mappings.dynamic_range_start = start;
        mappings.dynamic_range_end = end;
        Space::new(&mappings)
    }

    #[test]
    fn fixed_requests_win_over_dynamic_ones_that_come_first() {
        let dynamic = request(Mapping::Dynamic, 0x3000, PAGE);
        let requests = [dynamic, fixed(0x10_0000, 0x2000), dynamic];
        let found = place(space(Some(0x10_0000), None), requests).unwrap();
        assert_eq!(found, [0x10_2000, 0x10_0000, 0x10_5000]);
    }

    #[test]
    fn gaps_are_used_if_large_enough() {
        let mut space = space(Some(0x10_0000), None);
        space.claim("a", 0x10_1000, 0x1000).unwrap();
        space.claim("b", 0x10_4000, 0x1000).unwrap();
        let dynamic = |bytes| request(Mapping::Dynamic, bytes, PAGE);
        let found = place(space, [dynamic(0x2000), dynamic(0x1000), dynamic(0x2000)]).unwrap();
        assert_eq!(found, [0x10_2000, 0x10_0000, 0x10_5000]);
    }

    #[test]
    fn dynamic_addresses_are_aligned_canonical_and_in_range() {
        let gib = 1 << 30;
        let dynamic = request(Mapping::Dynamic, 2 * gib, gib);
        let found = place(space(Some(0x7fff_8000_0001), None), [dynamic]).unwrap();
        assert_eq!(found, [0xffff_8000_0000_0000]);
        let refused = place(space(Some(0x1000), Some(0x2000)), [dynamic]).unwrap_err();
        assert_eq!(refused, Error::NoAddressSpace { what: "it", bytes: 2 * gib });
        let last_pages = request(Mapping::Dynamic, 0x2000, PAGE);
        let found = place(space(Some(0xffff_ffff_ffff_d000), None), [last_pages, fixed(0, 0)]);
        assert_eq!(found.unwrap(), [0xffff_ffff_ffff_d000, 0]);
        let refused = place(space(Some(0xffff_ffff_ffff_e000), None), [last_pages]);
        assert!(refused.is_err());
        // The default range keeps clear of low addresses.
        let found = place(space(None, None), [last_pages]).unwrap();
        assert_eq!(found, [DYNAMIC_START]);
    }

    #[test]
    fn impossible_fixed_addresses_are_named() {
        let why = |request| match place(space(None, None), [request]).unwrap_err() {
            Error::BadAddress { why, .. } => why,
            other => panic!("{other:?}"),
        };
        assert_eq!(why(fixed(0x1800, PAGE)), "the address is not aligned as it must be");
        assert_eq!(why(fixed(0, PAGE)), "the address is already in use");
        assert_eq!(why(fixed(0x7fff_ffff_f000, 2 * PAGE)), "the address is not canonical");
        assert_eq!(why(fixed(u64::MAX - 0xfff, 2 * PAGE)), "it reaches past the last address");
        // The very last page is a valid fixed address.
        assert!(place(space(None, None), [fixed(u64::MAX - 0xfff, PAGE)]).is_ok());
    }
}
