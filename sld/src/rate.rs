//! How many split locks a VM may still have.

use core::num::NonZeroU64;

use crate::policy::PerSecond;

const TIMES: usize = PerSecond::MAX as usize;

/// Lets a VM's split locks pass ([`Verdict::Throttle`](crate::Verdict::Throttle)) so that in no
/// second, wherever it begins, there are more than the limit.
///
/// Belongs to the VM, under a lock that its vCPUs share. It remembers when each of the last
/// [`PerSecond::MAX`] was, in 8 KB and without allocation, so that the limit may be another one at
/// any time.
#[derive(Debug)]
#[cfg_attr(test, derive(Clone, PartialEq, Eq))]
pub struct RateLimiter {
    second: NonZeroU64,
    /// A ring; none is before one that is older.
    times: [u64; TIMES],
    /// Where the next one goes.
    next: usize,
    /// How many there are.
    count: usize,
}

impl RateLimiter {
    /// `second` is a second in the unit of time that [`allow`](Self::allow) is told: ticks of the
    /// time-stamp counter.
    #[must_use]
    pub const fn new(second: NonZeroU64) -> Self {
        Self { second, times: [0; TIMES], next: 0, count: 0 }
    }

    /// A split lock is about to happen at the time `now`, with this limit. If it may, it counts.
    ///
    /// `now` may be before the time that another CPU has told: the promise holds by the clock of
    /// each.
    ///
    /// # Errors
    ///
    /// The time before which none may happen. Until then the vCPU is descheduled; it then asks
    /// again, for others of its VM may have waited for the same time.
    pub fn allow(&mut self, now: u64, limit: PerSecond) -> Result<(), u64> {
        let limit = usize::from(limit.get());
        // With this one, those since that one would be more than the limit.
        if limit <= self.count {
            let first = self.times[(self.next + TIMES - limit) % TIMES];
            let earliest = first.saturating_add(self.second.get());
            if now < earliest {
                return Err(earliest);
            }
        }
        let last = self.times[(self.next + TIMES - 1) % TIMES];
        // A clock that is behind must not make room for one more.
        self.times[self.next] = now.max(last);
        self.next = (self.next + 1) % TIMES;
        self.count = TIMES.min(self.count + 1);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::format;
    use std::string::String;
    use std::vec;
    use std::vec::Vec;

    use super::{NonZeroU64, PerSecond, RateLimiter, TIMES};

    const SECOND: u64 = 4;
    const START: u64 = 1_000_000;

    fn limiter() -> RateLimiter {
        RateLimiter::new(NonZeroU64::new(SECOND).unwrap())
    }

    fn limit(limit: u16) -> PerSecond {
        PerSecond::new(limit).unwrap()
    }

    /// One with so many split locks in its past, all long ago.
    fn with_past(count: usize) -> RateLimiter {
        let mut limiter = limiter();
        for at in 0..count as u64 {
            assert_eq!(limiter.allow(at * SECOND, limit(1)), Ok(()));
        }
        limiter
    }

    /// A sequence of questions so far.
    struct Asked {
        limiter: RateLimiter,
        /// When split locks happened.
        happened: Vec<u64>,
        now: u64,
        /// The clock has never gone back.
        steady: bool,
    }

    impl Asked {
        /// All questions that may follow, `depth` of them.
        fn ask_all(&self, depth: u32) -> Result<(), String> {
            for limit in 1..=3 {
                // Back by most of a second; the same time; forth by less, by one and by more.
                for now in [3, 0, 1, 4, 5]
                    .map(|delta| if delta == 3 { self.now - 3 } else { self.now + delta })
                {
                    let next = self.ask(now, limit)?;
                    if depth > 1 {
                        next.ask_all(depth - 1)?;
                    }
                }
            }
            Ok(())
        }

        fn ask(&self, now: u64, limit: u16) -> Result<Self, String> {
            let broken = |what: &str| {
                Err(format!("broken: {what}\nat {now}, limit {limit}: {:?}", self.happened))
            };
            let limit = PerSecond::new(limit).unwrap();
            let mut limiter = self.limiter.clone();
            let mut happened = self.happened.clone();
            let steady = self.steady && now >= self.now;
            match limiter.allow(now, limit) {
                Ok(()) => {
                    happened.push(now);
                    let begins =
                        happened.iter().filter(|&&begin| (begin..begin + SECOND).contains(&now));
                    let most = begins.map(|begin| {
                        happened.iter().filter(|&at| (*begin..begin + SECOND).contains(at)).count()
                    });
                    if most.max() > Some(usize::from(limit.get())) {
                        return broken("never more than the limit in a second");
                    }
                }
                Err(earliest) => {
                    if limiter != self.limiter {
                        return broken("what does not happen is not counted");
                    }
                    let second = happened.iter().filter(|&at| at + SECOND > now).count();
                    if steady && second < usize::from(limit.get()) {
                        return broken("nothing is refused below the limit");
                    }
                    let asked_then = |now| limiter.clone().allow(now, limit);
                    if asked_then(earliest - 1).is_ok() || asked_then(earliest) != Ok(()) {
                        return broken("a refusal says how long it holds");
                    }
                }
            }
            Ok(Self { limiter, happened, now, steady })
        }
    }

    #[test]
    fn every_short_sequence() {
        // The ring is fresh, about to be full, and full.
        for past in [0, TIMES - 2, TIMES + 1] {
            let asked =
                Asked { limiter: with_past(past), happened: Vec::new(), now: START, steady: true };
            asked.ask_all(4).unwrap_or_else(|broken| panic!("{broken}"));
        }
    }

    #[test]
    fn the_highest_limit() {
        let second = 10 * u64::from(PerSecond::MAX);
        let mut limiter = RateLimiter::new(NonZeroU64::new(second).unwrap());
        let highest = limit(PerSecond::MAX);
        for round in 0..3 {
            for at in 0..u64::from(PerSecond::MAX) {
                assert_eq!(limiter.allow(START + round * second + at, highest), Ok(()));
            }
            let next = START + (round + 1) * second;
            assert_eq!(limiter.allow(next - 1, highest), Err(next));
        }
    }

    /// Where split locks are told of when they have happened, a vCPU waits until its last one counts:
    /// so there are no more than the limit, and one for each vCPU.
    #[test]
    fn what_has_happened_waits_until_it_counts() {
        let mut most = 0;
        for (vcpus, allowed) in [(1, 1), (1, 4), (3, 1), (16, 3)] {
            let mut limiter = limiter();
            let mut happened = Vec::new();
            let mut waits = vec![false; vcpus];
            for now in START..START + 50 * SECOND {
                // One that is spread over time at first, which leaves room at each time later.
                let wanted = if now < START + SECOND { 1 } else { usize::MAX };
                for waits in &mut waits {
                    for _ in 0..wanted {
                        if !core::mem::replace(waits, true) {
                            happened.push(now);
                        }
                        if limiter.allow(now, limit(allowed)).is_err() {
                            break;
                        }
                        *waits = false;
                    }
                }
            }
            let bound = usize::from(allowed) + vcpus;
            for begin in START..START + 49 * SECOND {
                let second = begin..begin + SECOND;
                let count = happened.iter().filter(|at| second.contains(at)).count();
                assert!(count <= bound, "{count} by {vcpus} vCPUs with limit {allowed}");
                most = most.max(count);
            }
        }
        assert!(most > 3, "they come as often as they may");
    }

    #[test]
    fn a_lower_limit_counts_what_was_before() {
        let mut limiter = limiter();
        for _ in 0..3 {
            assert_eq!(limiter.allow(START, limit(3)), Ok(()));
        }
        assert_eq!(limiter.allow(START + 1, limit(2)), Err(START + SECOND));
        assert_eq!(limiter.allow(START + 1, limit(4)), Ok(()));
        assert_eq!(limiter.allow(START + SECOND, limit(2)), Ok(()));
        assert_eq!(limiter.allow(START + SECOND, limit(2)), Err(START + 1 + SECOND));
    }
}
