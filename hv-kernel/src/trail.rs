//! The last exits of a CPU, for the panic message.

use core::fmt;
use core::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use vmx::exit::BasicReason;

/// How many are kept.
const LENGTH: usize = 16;

/// A ring of the last exits. Written by one CPU, read by a panic on the same.
pub struct Trail {
    /// Where the next one goes.
    next: AtomicUsize,
    /// Reason and guest RIP; the reason is [`NONE`] where there was no exit yet.
    exits: [[AtomicU64; 2]; LENGTH],
}

/// No exit reason.
const NONE: u64 = u64::MAX;

impl Trail {
    /// An empty one.
    pub const fn new() -> Self {
        let exits = [const { [AtomicU64::new(NONE), AtomicU64::new(0)] }; LENGTH];
        Self { next: AtomicUsize::new(0), exits }
    }

    /// Adds an exit. There is one writer, so no locked instruction is needed.
    #[inline(always)]
    pub fn push(&self, reason: BasicReason, rip: u64) {
        let next = self.next.load(Ordering::Relaxed) % LENGTH;
        let [latest, address] = &self.exits[next];
        latest.store(reason.0.into(), Ordering::Relaxed);
        address.store(rip, Ordering::Relaxed);
        self.next.store(next + 1, Ordering::Relaxed);
    }
}

impl fmt::Display for Trail {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "last VM exits, the newest first:")?;
        let next = self.next.load(Ordering::Relaxed);
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
