//! How fast the time-stamp counter runs.

use core::num::NonZeroU64;

/// Taken where the CPU does not say: faster than any, so that what is promised for a second of time
/// holds for a longer one.
const FASTEST: NonZeroU64 = NonZeroU64::new(8_000_000_000).unwrap();

/// Ticks of the time-stamp counter in a second: not less than there are.
pub fn ticks_per_second() -> NonZeroU64 {
    known_ticks_per_second().unwrap_or(FASTEST)
}

/// The same as far as the CPU says it.
pub fn known_ticks_per_second() -> Option<NonZeroU64> {
    let leaf = |number| {
        let highest = core::arch::x86_64::__cpuid(0).eax;
        let answer = (highest >= number).then(|| core::arch::x86_64::__cpuid(number));
        answer.map_or([0; 3], |answer| [answer.eax, answer.ebx, answer.ecx])
    };
    from_cpuid(leaf(0x15), leaf(0x16)[0])
}

/// From EAX, EBX and ECX of leaf 15h and EAX of leaf 16h; zero where they say nothing. SDM volume 3,
/// section "Determining the Processor Base Frequency".
fn from_cpuid([denominator, numerator, crystal]: [u32; 3], base_mhz: u32) -> Option<NonZeroU64> {
    let exact = (u64::from(crystal) * u64::from(numerator)).checked_div(denominator.into());
    exact.and_then(NonZeroU64::new).or(NonZeroU64::new(u64::from(base_mhz & 0xffff) * 1_000_000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_crystal_comes_before_the_base_frequency() {
        let hertz = |leaf_15, leaf_16| from_cpuid(leaf_15, leaf_16).map(NonZeroU64::get);
        assert_eq!(hertz([2, 188, 24_000_000], 3000), Some(2_256_000_000));
        assert_eq!(hertz([2, 188, 0], 3000), Some(3_000_000_000));
        assert_eq!(hertz([0, 188, 24_000_000], 3000), Some(3_000_000_000));
        assert_eq!(hertz([0; 3], 0xffff_0bb8), Some(3_000_000_000));
        assert_eq!(hertz([0; 3], 0), None);
    }
}
