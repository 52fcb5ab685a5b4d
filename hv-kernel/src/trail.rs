//! The last exits of a CPU, for the panic message.

use core::fmt;
use core::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use vmx::exit::BasicReason;

/// How many are kept.
const LENGTH: usize = 16;

/// A ring of the last exits. Written by one CPU, read by a panic on the same.
pub struct Trail {
    /// Where the next one goes, in sixteenths of a place, so that it wraps around by itself.
    next: AtomicU8,
    /// Reason and guest RIP; the reason is [`NONE`] where there was no exit yet.
    exits: [[AtomicU64; 2]; LENGTH],
}

/// What [`Trail`] counts a place as.
const PLACE: u8 = 16;
const _: () = assert!(LENGTH * PLACE as usize == 256);
/// No exit reason.
const NONE: u64 = u64::MAX;

impl Trail {
    /// An empty one.
    pub const fn new() -> Self {
        let exits = [const { [AtomicU64::new(NONE), AtomicU64::new(0)] }; LENGTH];
        Self { next: AtomicU8::new(0), exits }
    }

    /// Adds an exit. There is one writer, so no locked instruction is needed.
    #[inline(always)]
    pub fn push(&self, reason: BasicReason, rip: u64) {
        let next = self.next.load(Ordering::Relaxed);
        let [latest, address] = &self.exits[usize::from(next / PLACE)];
        latest.store(reason.0.into(), Ordering::Relaxed);
        address.store(rip, Ordering::Relaxed);
        self.next.store(next.wrapping_add(PLACE), Ordering::Relaxed);
    }
}

impl fmt::Display for Trail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "last VM exits, the newest first:")?;
        let next = usize::from(self.next.load(Ordering::Relaxed) / PLACE);
        for index in (next..next + LENGTH).rev() {
            let [reason, rip] = &self.exits[index % LENGTH];
            let reason = reason.load(Ordering::Relaxed);
            if reason != NONE {
                let reason = BasicReason(reason as u16);
                write!(f, "\n  {reason} at guest RIP {:#x}", rip.load(Ordering::Relaxed))?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::format;

    #[test]
    fn the_newest_comes_first_and_the_oldest_goes() {
        let trail = Trail::new();
        assert!(format!("{trail}").ends_with("newest first:"));
        (0..20).for_each(|rip| trail.push(BasicReason::CPUID, rip));
        let text = format!("{trail}");
        assert!(text.contains("newest first:\n  cpuid at guest RIP 0x13\n"));
        assert!(text.ends_with("cpuid at guest RIP 0x4"));
    }
}
