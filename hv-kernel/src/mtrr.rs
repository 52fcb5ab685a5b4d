//! Memory types by physical address, as the firmware has set them up.
//!
//! Source: SDM volume 3, section "Memory Type Range Registers (MTRRs)".

use core::fmt;

use arrayvec::ArrayVec;

/// IA32_MTRRCAP: bits 7:0 how many variable ranges there are, bit 8 there are fixed ones.
const CAPABILITIES: u32 = 0xfe;
/// IA32_MTRR_DEF_TYPE: bits 7:0 the default type, bit 10 the fixed ranges are in force, bit 11 all are.
const DEFAULT: u32 = 0x2ff;
/// IA32_MTRR_PHYSBASE0; each range has a base and, in the next MSR, a mask.
const VARIABLE: u32 = 0x200;
/// Physical mask: the range is in force.
const VALID: u64 = 1 << 11;
/// The part of a base or mask that is an address.
const ADDRESS: u64 = !0xfff;
/// More variable ranges than any CPU has; the architecture's MSR numbers end there.
const MAX_VARIABLE: usize = 32;
/// Fixed ranges: the first MSR's number, how many MSRs, and the length of one of the eight parts of
/// each. They cover the first MiB without a gap.
const FIXED: [(u32, u32, u64); 3] =
    [(0x250, 1, 64 << 10), (0x258, 2, 16 << 10), (0x268, 8, 4 << 10)];
/// How many MSRs that are.
const FIXED_COUNT: usize = 11;
/// Where they end.
const FIXED_END: u64 = 1 << 20;

/// A memory type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// UC.
    Uncacheable,
    /// WC.
    WriteCombining,
    /// WT.
    WriteThrough,
    /// WP.
    WriteProtected,
    /// WB.
    WriteBack,
    /// A number that means nothing, or ranges that must not overlap do.
    Undefined,
}

impl Kind {
    const fn of(number: u8) -> Self {
        match number {
            0 => Self::Uncacheable,
            1 => Self::WriteCombining,
            4 => Self::WriteThrough,
            5 => Self::WriteProtected,
            6 => Self::WriteBack,
            _ => Self::Undefined,
        }
    }

    /// The type where two variable ranges overlap: section "MTRR Precedences".
    fn with(self, other: Self) -> Self {
        use Kind::{Uncacheable, WriteBack, WriteThrough};
        match (self, other) {
            (one, two) if one == two => one,
            (Uncacheable, _) | (_, Uncacheable) => Uncacheable,
            (WriteThrough, WriteBack) | (WriteBack, WriteThrough) => WriteThrough,
            _ => Self::Undefined,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Uncacheable => "UC",
            Self::WriteCombining => "WC",
            Self::WriteThrough => "WT",
            Self::WriteProtected => "WP",
            Self::WriteBack => "WB",
            Self::Undefined => "undefined",
        })
    }
}

/// A variable range: addresses that agree with the base in all bits of the mask.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Variable {
    base: u64,
    mask: u64,
    kind: Kind,
}

impl Variable {
    const fn contains(&self, address: u64) -> bool {
        address & self.mask == self.base & self.mask
    }

    /// Where, above `address`, the range next begins or ends; `None` if it does not.
    ///
    /// A mask need not be contiguous: then the range is several pieces.
    fn next_border(&self, address: u64) -> Option<u64> {
        if self.contains(address) {
            let piece = 1u64.checked_shl(self.mask.trailing_zeros())?;
            return (address | (piece - 1)).checked_add(1);
        }
        let base = self.base & self.mask;
        // The highest bit in which the address is not the range's.
        let highest = 63 - ((address ^ base) & self.mask).leading_zeros();
        let (bit, below) = (1 << highest, (1u64 << highest) - 1);
        let above = address & !(below | bit);
        if base & bit != 0 {
            return Some(above | base & (below | bit));
        }
        // It is beyond: the next piece has the lowest free bit above that is still 0.
        let carry = !self.mask & !address & !(below | bit);
        let carry = carry & carry.wrapping_neg();
        let kept = address & !carry.wrapping_sub(1);
        (carry != 0).then(|| kept | carry | base & (carry - 1))
    }
}

/// A CPU's MTRRs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mtrrs {
    /// All are in force; otherwise all memory is uncacheable.
    pub enabled: bool,
    /// Where no range is.
    default: Kind,
    /// The fixed ranges, if they are there and in force.
    fixed: Option<[u64; FIXED_COUNT]>,
    variable: ArrayVec<Variable, MAX_VARIABLE>,
}

impl Mtrrs {
    /// Reads them on a CPU that has them (CPUID.1:EDX\[12\]), with physical addresses of `width`
    /// bits. `None` if `read` fails.
    pub fn read(width: u32, mut read: impl FnMut(u32) -> Option<u64>) -> Option<Self> {
        let (capabilities, default) = (read(CAPABILITIES)?, read(DEFAULT)?);
        let enabled = default & 1 << 11 != 0;
        let mut fixed = None;
        if capabilities & 1 << 8 != 0 && default & 1 << 10 != 0 {
            let numbers = FIXED.iter().flat_map(|(first, count, _)| *first..*first + *count);
            let mut values = [0; FIXED_COUNT];
            for (value, number) in values.iter_mut().zip(numbers) {
                *value = read(number)?;
            }
            fixed = Some(values);
        }
        let beyond = u64::MAX.checked_shl(width).unwrap_or(0);
        let mut variable = ArrayVec::new();
        let count = (capabilities as u32 & 0xff).min(MAX_VARIABLE as u32);
        for number in (VARIABLE..).step_by(2).take(count as usize) {
            let (base, mask) = (read(number)?, read(number + 1)?);
            if mask & VALID != 0 {
                variable.push(Variable {
                    base: base & ADDRESS & !beyond,
                    // No physical address has more bits.
                    mask: mask & ADDRESS | beyond,
                    kind: Kind::of(base as u8),
                });
            }
        }
        Some(Self { enabled, default: Kind::of(default as u8), fixed, variable })
    }

    /// The type of the memory at a physical address.
    pub fn kind(&self, address: u64) -> Kind {
        if !self.enabled {
            return Kind::Uncacheable;
        }
        if let Some((kind, _)) = self.fixed_kind(address) {
            return kind;
        }
        let ranges = self.variable.iter().filter(|range| range.contains(address));
        ranges.map(|range| range.kind).reduce(Kind::with).unwrap_or(self.default)
    }

    /// The type that a fixed range gives, and where that range ends.
    fn fixed_kind(&self, address: u64) -> Option<(Kind, u64)> {
        let values = self.fixed.as_ref().filter(|_| address < FIXED_END)?;
        let (mut start, mut index) = (0, 0);
        for (_, count, length) in FIXED {
            let end = start + u64::from(count) * 8 * length;
            if address < end {
                let part = (address - start) / length;
                let value = values[index + part as usize / 8];
                let kind = Kind::of((value >> (part % 8 * 8)) as u8);
                return Some((kind, start + (part + 1) * length));
            }
            (start, index) = (end, index + count as usize);
        }
        None
    }

    /// Divides `start..end` into parts of one type each, in order: start, end, type.
    pub fn parts(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64, Kind)> + '_ {
        let mut at = start;
        core::iter::from_fn(move || {
            let (from, kind) = (at, (at < end).then(|| self.kind(at))?);
            while at < end && self.kind(at) == kind {
                at = self.next_border(at).unwrap_or(end).min(end);
            }
            Some((from, at, kind))
        })
    }

    /// Where, above `address`, the type may next be another.
    fn next_border(&self, address: u64) -> Option<u64> {
        if !self.enabled {
            return None;
        }
        if let Some((_, end)) = self.fixed_kind(address) {
            return Some(end);
        }
        let variable = self.variable.iter().filter_map(|range| range.next_border(address)).min();
        let fixed = (self.fixed.is_some() && address < FIXED_END).then_some(FIXED_END);
        variable.into_iter().chain(fixed).min()
    }
}

impl fmt::Display for Mtrrs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.enabled {
            return f.write_str("off: all memory is uncacheable");
        }
        let fixed = if self.fixed.is_some() { "with" } else { "without" };
        write!(f, "default {}, {fixed} fixed ranges", self.default)?;
        self.variable.iter().try_for_each(|range| {
            write!(f, "; {} {:#x} mask {:#x}", range.kind, range.base, range.mask)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    const UC: Kind = Kind::Uncacheable;
    const WB: Kind = Kind::WriteBack;
    const MIB: u64 = 1 << 20;
    const GIB: u64 = 1 << 30;
    const WIDTH: u32 = 39;

    /// MTRRs with fixed ranges as usual, this default, and ranges of base, length and type.
    fn mtrrs(default: u64, ranges: &[(u64, u64, u64)]) -> Mtrrs {
        let mut msrs = BTreeMap::from([(CAPABILITIES, 0x50a), (DEFAULT, default)]);
        let fixed = FIXED.iter().flat_map(|(first, count, _)| *first..*first + *count);
        msrs.extend(fixed.map(|number| (number, 0x0606_0606_0606_0606)));
        // VGA, and ROM above.
        msrs.insert(0x259, 0);
        msrs.extend((0x268..0x270).map(|number| (number, 0x0505_0505_0505_0505)));
        msrs.extend((VARIABLE..VARIABLE + 20).map(|number| (number, 0)));
        for (number, (base, length, kind)) in (VARIABLE..).step_by(2).zip(ranges) {
            msrs.insert(number, base | kind);
            msrs.insert(number + 1, !(length - 1) & ((1 << WIDTH) - 1) | VALID);
        }
        Mtrrs::read(WIDTH, |number| msrs.get(&number).copied()).unwrap()
    }

    fn parts(mtrrs: &Mtrrs, start: u64, end: u64) -> Vec<(u64, u64, Kind)> {
        mtrrs.parts(start, end).collect()
    }

    /// A laptop of 2012: default UC, memory composed of write-back ranges, graphics memory cut out.
    #[test]
    fn write_back_ranges_on_an_uncacheable_default() {
        let mtrrs = mtrrs(
            0xc00,
            &[
                (0, 4 * GIB, 6),
                (4 * GIB, 4 * GIB, 6),
                (8 * GIB, 512 * MIB, 6),
                (0xdc00_0000, 64 * MIB, 0),
                (0xe000_0000, 512 * MIB, 0),
                (0x21f8_00000, 8 * MIB, 0),
            ],
        );
        assert_eq!(
            parts(&mtrrs, MIB, 9 * GIB),
            [
                (MIB, 0xdc00_0000, WB),
                (0xdc00_0000, 4 * GIB, UC),
                (4 * GIB, 0x21f8_00000, WB),
                (0x21f8_00000, 9 * GIB, UC),
            ]
        );
    }

    /// What firmware does by now: default write-back, everything below 4 GiB that is no memory
    /// uncacheable, and the space for 64-bit PCI too.
    #[test]
    fn uncacheable_ranges_on_a_write_back_default() {
        let mtrrs = mtrrs(
            0xc06,
            &[(0x8000_0000, 2 * GIB, 0), (0x7800_0000, 128 * MIB, 0), (256 * GIB, 256 * GIB, 0)],
        );
        assert_eq!(
            parts(&mtrrs, 0, 512 * GIB),
            [
                (0, 0xa0000, WB),
                (0xa0000, 0xc0000, UC),
                (0xc0000, MIB, Kind::WriteProtected),
                (MIB, 0x7800_0000, WB),
                (0x7800_0000, 4 * GIB, UC),
                (4 * GIB, 256 * GIB, WB),
                (256 * GIB, 512 * GIB, UC),
            ]
        );
    }

    #[test]
    fn overlaps_follow_the_manual() {
        let two = |one, two| mtrrs(0xc06, &[(GIB, GIB, one), (GIB, GIB, two)]).kind(GIB);
        for kind in [0, 1, 4, 5, 6] {
            assert_eq!(two(kind, kind), Kind::of(kind as u8));
            assert_eq!((two(kind, 0), two(0, kind)), (UC, UC));
        }
        assert_eq!((two(4, 6), two(6, 4)), (Kind::WriteThrough, Kind::WriteThrough));
        for (one, other) in [(1, 6), (6, 1), (5, 6), (1, 4), (4, 5), (2, 6)] {
            assert_eq!(two(one, other), Kind::Undefined, "{one} {other}");
        }
        // Three: UC wins whatever the others make of each other.
        let three = mtrrs(0xc06, &[(GIB, GIB, 1), (GIB, GIB, 6), (GIB, GIB, 0)]);
        assert_eq!(three.kind(GIB), UC);
    }

    #[test]
    fn what_is_off_counts_for_nothing() {
        let ranges = [(0, GIB, 6)];
        let off = mtrrs(0x406, &ranges);
        assert!(!off.enabled);
        assert_eq!(parts(&off, 0, GIB), [(0, GIB, UC)]);
        // The fixed ranges alone are off.
        assert_eq!(parts(&mtrrs(0x806, &ranges), 0, GIB), [(0, GIB, WB)]);
        // A range that is not valid.
        let mut invalid = mtrrs(0xc06, &[]);
        assert!(invalid.variable.is_empty());
        invalid.fixed = None;
        assert_eq!(parts(&invalid, 0, GIB), [(0, GIB, WB)]);
        assert_eq!(Mtrrs::read(WIDTH, |_| None), None);
    }

    #[test]
    fn a_mask_with_gaps_makes_several_pieces() {
        let mut mtrrs = mtrrs(0xc06, &[(0, GIB, 0)]);
        // Bit 31 is not compared: below 1 GiB, and again from 2 GiB.
        mtrrs.variable[0].mask &= !(1 << 31);
        assert_eq!(
            parts(&mtrrs, MIB, 4 * GIB),
            [(MIB, GIB, UC), (GIB, 2 * GIB, WB), (2 * GIB, 3 * GIB, UC), (3 * GIB, 4 * GIB, WB)]
        );
    }

    /// Borders against a look at each page of a small address space, with all masks and pairs of ranges
    /// that differ in more than their place.
    #[test]
    fn parts_are_what_each_page_is() {
        const PAGES: u64 = 32;
        let variable = |base: u64, mask: u64, kind| Variable {
            base: base << 12,
            mask: mask << 12 | !0 << 17,
            kind: Kind::of(kind),
        };
        for (mask, base) in (0..PAGES).flat_map(|mask| (0..PAGES).map(move |base| (mask, base))) {
            for (other_mask, other_base, start) in [(0x1f, 7, 0), (0x18, 8, 3), (0x0a, 2, 9)] {
                let mut mtrrs = mtrrs(0xc06, &[]);
                mtrrs.fixed = None;
                mtrrs.variable.push(variable(base, mask, 0));
                mtrrs.variable.push(variable(other_base, other_mask, 4));
                let parts = mtrrs.parts(start << 12, PAGES << 12);
                let pages = parts.flat_map(|(from, to, kind)| {
                    assert!(from < to);
                    (from >> 12..to >> 12).map(move |page| (page, kind))
                });
                let expected = (start..PAGES).map(|page| (page, mtrrs.kind(page << 12)));
                assert!(pages.eq(expected), "{mtrrs:?}");
            }
        }
    }
}
