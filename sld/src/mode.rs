//! The host's mode, and what one VM gets of it.

use core::fmt;
use core::str::FromStr;

/// The host's policy for split locks, chosen at boot. Ordered from lenient to strict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SldMode {
    /// The real bit is 0: split locks execute, nobody is told.
    Off,
    /// A task's first split lock is reported, then detection is off while that task runs.
    Warn,
    /// The real bit is 1 from boot to shutdown; a split lock ends the VM that executes it.
    Fatal,
}

impl SldMode {
    /// The name used in configuration and events.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Off => "off",
            Self::Warn => "warn",
            Self::Fatal => "fatal",
        }
    }
}

impl fmt::Display for SldMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A text that names no mode.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnknownMode;

impl fmt::Display for UnknownMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("unknown split-lock mode: use off, warn or fatal")
    }
}

impl core::error::Error for UnknownMode {}

impl FromStr for SldMode {
    type Err = UnknownMode;

    fn from_str(s: &str) -> Result<Self, UnknownMode> {
        [Self::Off, Self::Warn, Self::Fatal]
            .into_iter()
            .find(|mode| mode.as_str() == s)
            .ok_or(UnknownMode)
    }
}

/// What the host can promise its VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// The mode that was asked for.
    pub configured: SldMode,
    /// The weakest [`Cpu::mode`](crate::Cpu::mode) of all CPUs on which a vCPU may run: `Off`
    /// where one of them cannot detect.
    pub enforced: SldMode,
}

/// What one VM gets: its policy, and whether it is told that it has the feature. Every vCPU of
/// the VM is made from a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub struct VmPolicy {
    pub(crate) mode: SldMode,
    pub(crate) exposed: bool,
}

impl VmPolicy {
    /// `own` is the VM's own policy, `None` for the host's mode; `expose` asks that the guest
    /// see the feature, which it does only if the host enforces some mode: a guest must not be
    /// promised an #AC that nothing raises.
    ///
    /// # Errors
    ///
    /// `own` can only be stricter than the host's mode: a laxer one would have to switch off
    /// what the host wants on. With the host `Off` no other policy can be kept.
    pub fn new(host: Host, own: Option<SldMode>, expose: bool) -> Result<Self, PolicyError> {
        let mode = own.unwrap_or(host.configured);
        if mode < host.configured || (host.configured == SldMode::Off && mode != SldMode::Off) {
            return Err(PolicyError { host: host.configured, vm: mode });
        }
        let exposed = expose && mode != SldMode::Off && host.enforced != SldMode::Off;
        Ok(Self { mode, exposed })
    }

    /// The mode that decides this VM's split locks on a CPU that enforces one.
    #[must_use]
    pub const fn mode(self) -> SldMode {
        self.mode
    }

    /// Whether the guest is told: CPUID.(7,0):EDX\[30\]
    /// ([`CPUID_CORE_CAPABILITIES`](crate::CPUID_CORE_CAPABILITIES)) is 1 in its CPUID.
    #[must_use]
    pub const fn exposed(self) -> bool {
        self.exposed
    }
}

/// A VM's policy that the host's mode does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyError {
    /// The host's mode.
    pub host: SldMode,
    /// What the VM asked for.
    pub vm: SldMode,
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, vm } = self;
        if *host == SldMode::Off {
            write!(f, "policy {vm} cannot be kept: split-lock detection of the host is off")
        } else {
            write!(f, "policy {vm} is weaker than the host's mode {host}")
        }
    }
}

impl core::error::Error for PolicyError {}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::SldMode::{Fatal, Off, Warn};
    use super::{Host, PolicyError, SldMode, UnknownMode, VmPolicy};

    #[test]
    fn names_are_read_back() {
        for mode in [Off, Warn, Fatal] {
            assert_eq!(mode.to_string().parse(), Ok(mode));
        }
        for wrong in ["", "Warn", "warn ", "on"] {
            assert_eq!(wrong.parse::<SldMode>(), Err(UnknownMode), "{wrong}");
        }
    }

    #[test]
    fn a_vm_may_only_be_stricter() {
        for configured in [Off, Warn, Fatal] {
            let host = Host { configured, enforced: configured };
            for (own, allowed) in [
                (None, true),
                (Some(Off), configured == Off),
                (Some(Warn), configured == Warn),
                (Some(Fatal), configured != Off),
            ] {
                let policy = VmPolicy::new(host, own, false);
                let vm = own.unwrap_or(configured);
                let expected =
                    if allowed { Ok(vm) } else { Err(PolicyError { host: configured, vm }) };
                assert_eq!(policy.map(VmPolicy::mode), expected);
            }
        }
    }

    #[test]
    fn nothing_is_exposed_that_the_host_does_not_enforce() {
        for configured in [Off, Warn, Fatal] {
            for enforced in [Off, configured] {
                let host = Host { configured, enforced };
                for expose in [false, true] {
                    let vm = VmPolicy::new(host, None, expose).unwrap();
                    assert_eq!(vm.exposed(), expose && enforced != Off, "{host:?}");
                }
            }
        }
    }
}
