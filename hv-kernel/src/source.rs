//! Where each VM's split locks are detected, and what CPUs and VMs get for that.
//!
//! There are two domains of detection, in each of which every CPU has a bit and every vCPU's task a
//! flag: the CPUs' own, with the real bit, and the software's, with a bit that says whether the guest is
//! traced. A VM's policy, its guest's MSR and its verdicts are those of one domain. In the other one,
//! it is a VM that nobody looks for split locks of: as far as the host allows that.

use core::fmt;

use sld::{Detection, Host, Policy, PolicyError, SldMode, Source, VmPolicy};
use vmx::bus_lock;
use vmx::capability::Capabilities;

use crate::config::{Config, VmConfig};

/// What the VMs ask for.
#[derive(Debug, Clone, Copy)]
pub struct Wishes {
    configured: Policy,
    default: Source,
    /// Some VM may have the CPUs' detection.
    msr: bool,
    /// Some VM is to be traced where the CPUs detect nothing.
    auto: bool,
    /// Some VM is to be traced everywhere.
    trace: bool,
}

impl Wishes {
    /// Those of this file.
    pub fn of(config: &Config) -> Self {
        let any = |wanted: &[Source]| {
            let mut sources = config.vms.iter().map(|vm| vm.source.unwrap_or(config.source));
            sources.any(|source| wanted.contains(&source))
        };
        Self {
            configured: config.sld,
            default: config.source,
            msr: any(&[Source::Auto, Source::Msr]),
            auto: any(&[Source::Auto]),
            trace: any(&[Source::Trace]),
        }
    }

    /// The mode of the CPUs' own detection: off where no VM has it.
    pub const fn real_mode(&self) -> SldMode {
        if self.msr { self.configured.mode() } else { SldMode::Off }
    }

    /// The mode of the software's, on CPUs of which this was found; `None` where no VM is traced.
    pub fn software_mode(&self, detection: Detection) -> Option<SldMode> {
        let traced = self.trace || self.auto && detection != Detection::Works;
        traced.then_some(self.configured.mode())
    }

    /// What it comes to on these CPUs, whose own detection has this mode.
    pub const fn on(self, detection: Detection, real: SldMode) -> Domains {
        Domains { configured: self.configured, default: self.default, detection, real }
    }
}

/// What VMs can be given.
#[derive(Debug, Clone, Copy)]
pub struct Domains {
    configured: Policy,
    default: Source,
    detection: Detection,
    /// What the CPUs' own detection enforces.
    real: SldMode,
}

/// What one VM gets.
#[derive(Debug, Clone, Copy)]
pub struct Given {
    /// Where its split locks are detected: any but `Auto`.
    pub source: Source,
    /// What is done about them.
    pub policy: VmPolicy,
    /// What it is to the CPUs' own detection, if that is another domain.
    pub aside: Option<VmPolicy>,
}

/// Why a VM gets nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NotGiven {
    /// It asks for the CPUs' detection, and there is none.
    NoMsr(Detection),
    /// It wants its split locks limited, and is not looked at beside VMs that are.
    NothingToLimit,
    /// It wants its split locks limited, nothing detects them, and the CPU does not tell of bus locks.
    NoBusLockExits,
    /// Its policy does not go with the host's mode.
    Policy(PolicyError),
}

impl fmt::Display for NotGiven {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let use_others = "use source auto or trace";
        match self {
            Self::NoMsr(Detection::Failed(why)) => write!(
                f,
                "source msr: split-lock detection does not work on this machine's CPUs ({why}); \
                 {use_others}"
            ),
            Self::NoMsr(_) => write!(
                f,
                "source msr: this machine's CPUs have no split-lock detection; {use_others}"
            ),
            Self::NothingToLimit => write!(
                f,
                "a ratelimit with source none has nothing to go by; {use_others}, or another policy"
            ),
            Self::NoBusLockExits => f.write_str(
                "a ratelimit with source none needs a CPU that exits at bus locks, and this one does \
                 not; use source auto, or another policy",
            ),
            Self::Policy(error) => error.fmt(f),
        }
    }
}

impl From<PolicyError> for NotGiven {
    fn from(error: PolicyError) -> Self {
        Self::Policy(error)
    }
}

impl Domains {
    /// The source of VMs that say nothing; `None` as well if it is not to be had.
    pub fn default_source(&self) -> Source {
        self.default.on(self.detection).unwrap_or(Source::None)
    }

    /// What this VM gets on CPUs with these capabilities.
    ///
    /// # Errors
    ///
    /// [`NotGiven`]; other VMs are not concerned.
    pub fn give(&self, vm: &VmConfig, caps: &Capabilities) -> Result<Given, NotGiven> {
        let source = vm.source.unwrap_or(self.default).on(self.detection);
        let source = source.ok_or(NotGiven::NoMsr(self.detection))?;
        let (policy, aside) = match source {
            Source::Trace => {
                let software =
                    Host { configured: self.configured, enforced: self.configured.mode() };
                let policy = VmPolicy::new(software, vm.policy, vm.expose_sld)?;
                (policy, Some(self.unwatched().or_else(|_| self.as_all_others())?))
            }
            // Where the CPUs' detection is off, a policy is without effect, and may be any.
            Source::None if self.real == SldMode::Off => {
                let nobody = Host { configured: self.configured, enforced: SldMode::Off };
                (VmPolicy::new(nobody, vm.policy, false)?, None)
            }
            Source::None if matches!(vm.policy, Some(Policy::RateLimit(_))) => {
                return Err(NotGiven::NothingToLimit);
            }
            Source::None => (self.unwatched()?, None),
            Source::Auto | Source::Msr => {
                (VmPolicy::new(self.real_host(), vm.policy, vm.expose_sld)?, None)
            }
        };
        if !bus_lock::can_limit(policy, caps) {
            return Err(NotGiven::NoBusLockExits);
        }
        Ok(Given { source, policy, aside })
    }

    /// The CPUs' own detection.
    const fn real_host(&self) -> Host {
        let configured = match self.real {
            SldMode::Off => Policy::Off,
            SldMode::Warn | SldMode::Fatal => self.configured,
        };
        Host { configured, enforced: self.real }
    }

    /// A VM whose split locks the CPUs let pass. A fatal host lets none pass.
    fn unwatched(&self) -> Result<VmPolicy, PolicyError> {
        VmPolicy::new(self.real_host(), Some(Policy::Off), false)
    }

    /// A VM like all others, to the CPUs.
    fn as_all_others(&self) -> Result<VmPolicy, PolicyError> {
        VmPolicy::new(self.real_host(), None, false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sld::ProbeFailure;
    use std::format;
    use std::string::{String, ToString};

    /// A file with these keys, and a VM for each of the strings, which are more of its keys.
    fn config(keys: &str, vms: &[&str]) -> Config {
        let mut text = format!("{keys}\n");
        for (index, keys) in vms.iter().enumerate() {
            text += &format!("[[vm]]\nname=\"{index}\"\nimage=\"x\"\nmemory_mib=8\n{keys}\n");
        }
        Config::parse(text.as_bytes()).unwrap()
    }

    const BROKEN: Detection = Detection::Failed(ProbeFailure::ReadFault);

    /// CPUs that exit at bus locks, or do not.
    fn caps(exits: bool) -> Capabilities {
        let read = |msr| match msr {
            // IA32_VMX_PROCBASED_CTLS2.
            0x48b if !exits => Ok::<u64, ()>(0),
            _ => Ok(u64::MAX << 32),
        };
        Capabilities::read(read).unwrap()
    }

    /// What the first VM gets on CPUs that detect or do not.
    fn given(keys: &str, vms: &[&str], detection: Detection) -> Result<Given, String> {
        let config = config(keys, vms);
        let wishes = Wishes::of(&config);
        let real = if detection == Detection::Works { wishes.real_mode() } else { SldMode::Off };
        let given = wishes.on(detection, real).give(&config.vms[0], &caps(false));
        given.map_err(|why| why.to_string())
    }

    #[test]
    fn cpus_do_what_vms_ask_for() {
        let modes = |source: &str, vms: &[&str]| {
            let wishes = Wishes::of(&config(&format!("sld = \"fatal\"\n{source}"), vms));
            let software = [Detection::Works, Detection::Absent, BROKEN]
                .map(|detection| wishes.software_mode(detection));
            (wishes.real_mode(), software)
        };
        let (fatal, off) = (Some(SldMode::Fatal), SldMode::Off);
        assert_eq!(modes("", &[""]), (SldMode::Fatal, [None, fatal, fatal]));
        assert_eq!(modes("source = \"msr\"", &[""]), (SldMode::Fatal, [None; 3]));
        assert_eq!(modes("source = \"trace\"", &[""]), (off, [fatal; 3]));
        assert_eq!(modes("source = \"none\"", &[""]), (off, [None; 3]));
        let both = ["source = \"msr\"", "source = \"trace\""];
        assert_eq!(modes("source = \"none\"", &both), (SldMode::Fatal, [fatal; 3]));
    }

    #[test]
    fn a_vm_has_its_policy_where_it_is_detected() {
        let works = Detection::Works;
        let warn = "sld = \"warn\"";
        let by_cpu = given(warn, &["expose_sld = true"], works).unwrap();
        assert_eq!((by_cpu.source, by_cpu.aside.is_none()), (Source::Msr, true));
        assert!(by_cpu.policy.exposed() && by_cpu.policy.policy() == Policy::Warn);

        let keys = ["source = \"trace\"\npolicy = \"emulate\"\nexpose_sld = true", ""];
        let traced = given(warn, &keys, works).unwrap();
        assert_eq!((traced.source, traced.policy.policy()), (Source::Trace, Policy::Emulate));
        assert!(traced.policy.exposed());
        assert_eq!(traced.aside.map(VmPolicy::policy), Some(Policy::Off));

        for detection in [Detection::Absent, BROKEN] {
            let traced = given("sld = \"fatal\"", &["expose_sld = true"], detection).unwrap();
            assert_eq!((traced.source, traced.policy.policy()), (Source::Trace, Policy::Fatal));
            assert!(traced.policy.exposed());
            assert_eq!(traced.aside.map(VmPolicy::policy), Some(Policy::Off));
        }
        let keys = ["source = \"none\"\npolicy = \"ratelimit=5\"", "source = \"msr\""];
        let why = given(warn, &keys, works).unwrap_err();
        assert!(why.contains("a ratelimit with source none has nothing to go by"), "{why}");
        for others in [&[][..], &["source = \"trace\""], &["source = \"msr\""]] {
            let own = ["source = \"none\"\nexpose_sld = true"];
            let unseen = given(warn, &[&own, others].concat(), works).unwrap();
            let by_cpu = others.first().is_some_and(|keys| keys.contains("msr"));
            let policy = if by_cpu { Policy::Off } else { Policy::Warn };
            assert_eq!((unseen.source, unseen.policy.policy()), (Source::None, policy));
            assert!(!unseen.policy.exposed() && unseen.aside.is_none());
        }
    }

    #[test]
    fn a_limit_that_nothing_detects_needs_exits_at_bus_locks() {
        let config = config("sld = \"warn\"\nsource = \"none\"", &["policy = \"ratelimit=5\""]);
        let domains = Wishes::of(&config).on(Detection::Absent, SldMode::Off);
        let give = |exits| domains.give(&config.vms[0], &caps(exits));
        let limit = "ratelimit=5".parse().unwrap();
        assert_eq!(give(true).map(|given| given.policy.policy()).ok(), Some(limit));
        let why = give(false).unwrap_err();
        assert_eq!(why, NotGiven::NoBusLockExits);
        assert!(why.to_string().starts_with("a ratelimit with source none needs a CPU that exits"));
    }

    #[test]
    fn a_fatal_host_keeps_its_promise_to_the_others() {
        let (works, fatal) = (Detection::Works, "sld = \"fatal\"");
        let beside = |keys| given(fatal, &[keys, "source = \"msr\""], works);
        let traced = beside("source = \"trace\"").unwrap();
        assert_eq!(traced.aside.map(VmPolicy::policy), Some(Policy::Fatal));
        assert!(beside("source = \"none\"").unwrap_err().contains("the host is fatal"));
        // Where nobody was promised anything it may.
        assert!(given(fatal, &["source = \"none\""], works).is_ok());
    }

    #[test]
    fn who_insists_on_the_cpu_is_refused_without() {
        let keys = ["source = \"msr\""];
        let why = given("sld = \"warn\"", &keys, Detection::Absent).unwrap_err();
        assert!(why.contains("have no split-lock detection; use source auto or trace"), "{why}");
        let why = given("sld = \"warn\"", &keys, BROKEN).unwrap_err();
        assert!(why.contains("does not work") && why.contains("cannot be read"), "{why}");
        let config = config("sld = \"warn\"\nsource = \"msr\"", &[""]);
        let domains = Wishes::of(&config).on(Detection::Absent, SldMode::Off);
        assert_eq!(domains.default_source(), Source::None);
    }
}
