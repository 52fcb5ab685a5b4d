//! The host's mode, and what one VM gets of it.

use core::fmt;

use crate::policy::Policy;

/// What the host does with the real bit, from boot to shutdown. Ordered from lenient to strict.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SldMode {
    /// It is 0: split locks execute, nobody is told.
    Off,
    /// It is 1, and goes off for tasks and for single instructions.
    Warn,
    /// It is 1 and stays so.
    Fatal,
}

impl SldMode {
    /// The name used in configuration and events: that of the policy that is nothing else.
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

/// What the host can promise its VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Host {
    /// The policy that was asked for, for all VMs that ask for none of their own. Its
    /// [`mode`](Policy::mode) is the host's.
    pub configured: Policy,
    /// The weakest [`Cpu::mode`](crate::Cpu::mode) of all CPUs on which a vCPU may run: `Off`
    /// where one of them cannot detect.
    pub enforced: SldMode,
}

/// What one VM gets: its policy, and whether it is told that it has the feature. Every vCPU of
/// the VM is made from a copy.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[cfg_attr(test, derive(Hash))]
pub struct VmPolicy {
    policy: Policy,
    host: SldMode,
    enforced: SldMode,
    pub(crate) exposed: bool,
}

impl VmPolicy {
    /// `own` is the VM's own policy, `None` for the host's; `expose` asks that the guest see the
    /// feature, which it does only if the host enforces some mode: a guest must not be promised an
    /// #AC that nothing raises.
    ///
    /// # Errors
    ///
    /// The host's mode does not allow `own`: with the host `Off` nothing but `Off` can be kept;
    /// in `Fatal` the real bit never goes off, which leaves `Emulate` and `Fatal`.
    pub fn new(host: Host, own: Option<Policy>, expose: bool) -> Result<Self, PolicyError> {
        let Host { configured, enforced } = host;
        let exposed = expose && enforced != SldMode::Off;
        let same = Self { policy: configured, host: configured.mode(), enforced, exposed };
        own.map_or(Ok(same), |own| same.with(own))
    }

    /// The same with another policy. What the guest is told stays: it has looked already.
    ///
    /// # Errors
    ///
    /// As for [`new`](Self::new).
    pub fn with(self, policy: Policy) -> Result<Self, PolicyError> {
        if policy.is_kept_by(self.host) {
            Ok(Self { policy, ..self })
        } else {
            Err(PolicyError { host: self.host, vm: policy })
        }
    }

    /// What is done about this VM's split locks on a CPU that detects them.
    #[must_use]
    pub const fn policy(self) -> Policy {
        self.policy
    }

    /// Whether every CPU on which a vCPU may run raises #AC for its split locks. Without, its policy
    /// is without effect.
    #[must_use]
    pub const fn detected(self) -> bool {
        !matches!(self.enforced, SldMode::Off)
    }

    /// Whether the guest is told: CPUID.(7,0):EDX\[30\]
    /// ([`CPUID_CORE_CAPABILITIES`](crate::CPUID_CORE_CAPABILITIES)) is 1 in its CPUID.
    #[must_use]
    pub const fn exposed(self) -> bool {
        self.exposed
    }

    /// The flag of the VM's tasks while no vCPU is loaded: only one of a host that detects can
    /// run without.
    pub(crate) const fn unloaded_flag(self) -> bool {
        matches!((self.host, self.policy), (SldMode::Warn, Policy::Off))
    }
}

/// A VM's policy that the host's mode does not allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PolicyError {
    /// The host's mode.
    pub host: SldMode,
    /// What the VM asked for.
    pub vm: Policy,
}

impl fmt::Display for PolicyError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, vm } = self;
        write!(f, "policy {vm} cannot be kept: ")?;
        f.write_str(if *host == SldMode::Off {
            "split-lock detection of the host is off"
        } else {
            "the host is fatal and never switches detection off; use emulate or fatal"
        })
    }
}

impl core::error::Error for PolicyError {}

#[cfg(test)]
mod tests {
    use std::string::ToString;

    use super::{Host, PolicyError, SldMode, VmPolicy};
    use crate::policy::PerSecond;
    use crate::policy::Policy::{self, Emulate, Fatal, Off, RateLimit, Step, Warn};

    const TEN: Policy = RateLimit(PerSecond::new(10).unwrap());
    const ALL: [Policy; 6] = [Off, Warn, Step, Emulate, TEN, Fatal];

    #[test]
    fn a_vm_gets_what_the_host_can_keep() {
        for (configured, mode, kept) in [
            (Off, SldMode::Off, &[Off] as &[Policy]),
            (Warn, SldMode::Warn, &ALL),
            (Step, SldMode::Warn, &ALL),
            (Emulate, SldMode::Warn, &ALL),
            (TEN, SldMode::Warn, &ALL),
            (Fatal, SldMode::Fatal, &[Emulate, Fatal]),
        ] {
            let host = Host { configured, enforced: mode };
            assert_eq!(configured.mode(), mode);
            let same = VmPolicy::new(host, None, false).unwrap();
            assert_eq!(same.policy(), configured);
            for own in ALL {
                let expected = if kept.contains(&own) {
                    Ok(own)
                } else {
                    Err(PolicyError { host: mode, vm: own })
                };
                let new = VmPolicy::new(host, Some(own), false);
                assert_eq!(new.map(VmPolicy::policy), expected);
                assert_eq!(same.with(own), new);
            }
        }
    }

    #[test]
    fn nothing_is_exposed_that_the_host_does_not_enforce() {
        for configured in ALL {
            for enforced in [SldMode::Off, configured.mode()] {
                let host = Host { configured, enforced };
                for expose in [false, true] {
                    let vm = VmPolicy::new(host, None, expose).unwrap();
                    assert_eq!(vm.exposed(), expose && enforced != SldMode::Off, "{host:?}");
                }
            }
        }
    }

    #[test]
    fn a_refusal_says_what_the_host_does() {
        for (host, vm, text) in [
            (
                SldMode::Off,
                TEN,
                "policy ratelimit=10 cannot be kept: split-lock detection of the host is off",
            ),
            (
                SldMode::Fatal,
                Off,
                "policy off cannot be kept: the host is fatal and never switches detection off; \
                 use emulate or fatal",
            ),
        ] {
            assert_eq!(PolicyError { host, vm }.to_string(), text);
        }
    }
}
