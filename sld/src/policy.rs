//! What is done about a VM's split locks.

use core::fmt;
use core::num::NonZeroU16;
use core::str::FromStr;

use crate::mode::SldMode;

/// What is done about those split locks of a VM that are not its own affair: its guest has not
/// asked for an #AC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Policy {
    /// They execute, and nobody is told: detection is off while the VM runs.
    Off,
    /// A task's first one is reported, then detection is off while that task runs.
    Warn,
    /// Each executes with detection off for this one instruction, and is counted.
    Step,
    /// The hypervisor carries the access out itself: the bus is not locked.
    Emulate,
    /// As `Step`, so many a second at most; those above wait.
    RateLimit(PerSecond),
    /// It does not execute; the VM ends.
    Fatal,
}

impl Policy {
    /// What the host does with the real bit if this is its policy.
    #[must_use]
    pub const fn mode(self) -> SldMode {
        match self {
            Self::Off => SldMode::Off,
            Self::Warn | Self::Step | Self::Emulate | Self::RateLimit(_) => SldMode::Warn,
            Self::Fatal => SldMode::Fatal,
        }
    }

    /// Whether a host in this mode can do for a VM what the policy says. With detection off there
    /// is nothing to go by; and what never goes off is not switched off for one instruction
    /// either.
    pub(crate) const fn is_kept_by(self, host: SldMode) -> bool {
        match host {
            SldMode::Off => matches!(self, Self::Off),
            SldMode::Warn => true,
            SldMode::Fatal => matches!(self, Self::Emulate | Self::Fatal),
        }
    }

    /// Whether the real bit is to be on while the VM runs, whatever its guest has in its virtual
    /// MSR: each of its split locks is to be seen.
    pub(crate) const fn sees_all(self) -> bool {
        match self {
            Self::Off | Self::Warn => false,
            Self::Step | Self::Emulate | Self::RateLimit(_) | Self::Fatal => true,
        }
    }
}

/// The name used in configuration and events.
impl fmt::Display for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Off => "off",
            Self::Warn => "warn",
            Self::Step => "step",
            Self::Emulate => "emulate",
            Self::RateLimit(limit) => return write!(f, "ratelimit={limit}"),
            Self::Fatal => "fatal",
        })
    }
}

impl FromStr for Policy {
    type Err = UnknownPolicy;

    fn from_str(s: &str) -> Result<Self, UnknownPolicy> {
        Ok(match s {
            "off" => Self::Off,
            "warn" => Self::Warn,
            "step" => Self::Step,
            "emulate" => Self::Emulate,
            "fatal" => Self::Fatal,
            _ => {
                let limit = s.strip_prefix("ratelimit=").ok_or(UnknownPolicy)?;
                // Not all that parses is a number as people write it: "+5", "005".
                let plain = limit.starts_with(|first: char| matches!(first, '1'..='9'));
                let limit = limit.parse().ok().filter(|_| plain).and_then(PerSecond::new);
                Self::RateLimit(limit.ok_or(UnknownPolicy)?)
            }
        })
    }
}

/// A text that names no policy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownPolicy;

impl fmt::Display for UnknownPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "unknown split-lock policy: use off, warn, step, emulate, ratelimit=N (N split locks a \
             second, 1 to {}) or fatal",
            PerSecond::MAX
        )
    }
}

impl core::error::Error for UnknownPolicy {}

/// So many split locks a second, 1 to [`MAX`](Self::MAX).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PerSecond(NonZeroU16);

impl PerSecond {
    /// Enough to slow a machine down, at thousands of cycles each, and few enough to remember
    /// when each was ([`RateLimiter`](crate::RateLimiter)).
    pub const MAX: u16 = 1000;

    /// `None` if it is 0 or more than [`MAX`](Self::MAX).
    #[must_use]
    pub const fn new(limit: u16) -> Option<Self> {
        match NonZeroU16::new(limit) {
            Some(limit) if limit.get() <= Self::MAX => Some(Self(limit)),
            _ => None,
        }
    }

    /// The number.
    #[must_use]
    pub const fn get(self) -> u16 {
        self.0.get()
    }
}

impl fmt::Display for PerSecond {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::Policy::{Emulate, Fatal, Off, RateLimit, Step, Warn};
    use super::{PerSecond, Policy, UnknownPolicy};

    #[test]
    fn names_are_read_back() {
        for policy in [Off, Warn, Step, Emulate, Fatal] {
            assert_eq!(policy.to_string().parse(), Ok(policy));
        }
        for (name, number) in [("ratelimit=1", 1), ("ratelimit=1000", 1000)] {
            let policy = RateLimit(PerSecond::new(number).unwrap());
            assert_eq!((name.parse(), policy.to_string().as_str()), (Ok(policy), name));
        }
    }

    #[test]
    fn what_is_no_policy_is_refused() {
        for wrong in ["", "Warn", "warn ", "on", "ratelimit", "ratelimit=", "ratelimit=ten"] {
            assert_eq!(wrong.parse::<Policy>(), Err(UnknownPolicy), "{wrong}");
        }
        for number in ["0", "1001", "65536", "65537", "-1", "+1", "01", " 1", "1 ", "1.0"] {
            let wrong = "ratelimit=".to_string() + number;
            assert_eq!(wrong.parse::<Policy>(), Err(UnknownPolicy), "{wrong}");
        }
        let text = UnknownPolicy.to_string();
        for named in ["off", "warn", "step", "emulate", "ratelimit=N", "fatal", "1 to 1000"] {
            assert!(text.contains(named), "{text}");
        }
    }
}
