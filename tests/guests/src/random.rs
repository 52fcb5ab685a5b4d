//! Numbers that look random and are the same each time.

/// The generator: SplitMix64 (Steele, Lea, Flood, "Fast Splittable Pseudorandom Number Generators").
pub struct Random(u64);

impl Random {
    /// One whose numbers depend on both.
    pub fn new(seed: u64, stream: u64) -> Self {
        let mut random = Self(seed);
        Self(random.next().wrapping_add(stream.wrapping_mul(0xD6E8_FEB8_6659_FD93)))
    }

    /// The next number.
    #[expect(clippy::should_implement_trait, reason = "there is always a next one")]
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }

    /// True once in `number` times.
    pub fn one_in(&mut self, number: u64) -> bool {
        self.below(number) == 0
    }
}
