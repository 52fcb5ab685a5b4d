//! Where split locks are detected.

use core::fmt;
use core::str::FromStr;

use crate::cpu::Detection;

/// What tells of a VM's split locks, as it is configured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Source {
    /// The CPU where it detects them, else tracing.
    #[default]
    Auto,
    /// The CPU, by bit 29 of MSR 0x33.
    Msr,
    /// The hypervisor, which looks at each instruction before it is executed
    /// ([`SoftwareTestCtrl`](crate::SoftwareTestCtrl)).
    Trace,
    /// Nothing: they happen unseen.
    None,
}

impl Source {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Auto, Self::Msr, Self::Trace, Self::None];

    /// The name used in configuration and events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Msr => "msr",
            Self::Trace => "trace",
            Self::None => "none",
        }
    }

    /// What it comes to on CPUs of which this was found: any but `Auto`. `None` if it asks for
    /// what they do not have.
    #[must_use]
    pub const fn on(self, detection: Detection) -> Option<Self> {
        match (self, detection) {
            (Self::Auto | Self::Msr, Detection::Works) => Some(Self::Msr),
            (Self::Auto, _) => Some(Self::Trace),
            (Self::Msr, _) => None,
            (Self::Trace | Self::None, _) => Some(self),
        }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// No source has this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownSource;

impl fmt::Display for UnknownSource {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("unknown source of split-lock detection: use auto, msr, trace or none")
    }
}

impl core::error::Error for UnknownSource {}

impl FromStr for Source {
    type Err = UnknownSource;

    fn from_str(name: &str) -> Result<Self, UnknownSource> {
        Self::ALL.into_iter().find(|source| source.as_str() == name).ok_or(UnknownSource)
    }
}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::{Source, UnknownSource};
    use crate::cpu::{Detection, ProbeFailure};

    #[test]
    fn names_are_read_back() {
        for source in Source::ALL {
            assert_eq!(source.to_string().parse(), Ok(source));
        }
        for wrong in ["", "Auto", "trace ", "mtf"] {
            assert_eq!(wrong.parse::<Source>(), Err(UnknownSource), "{wrong}");
        }
        for source in Source::ALL {
            assert!(UnknownSource.to_string().contains(source.as_str()));
        }
    }

    #[test]
    fn the_cpu_is_taken_where_it_detects() {
        use Source::{Auto, Msr, None as Nothing, Trace};
        let broken = Detection::Failed(ProbeFailure::ReadFault);
        for (detection, expected) in [
            (Detection::Works, [Some(Msr), Some(Msr), Some(Trace), Some(Nothing)]),
            (Detection::Absent, [Some(Trace), None, Some(Trace), Some(Nothing)]),
            (broken, [Some(Trace), None, Some(Trace), Some(Nothing)]),
        ] {
            assert_eq!([Auto, Msr, Trace, Nothing].map(|source| source.on(detection)), expected);
        }
    }
}
