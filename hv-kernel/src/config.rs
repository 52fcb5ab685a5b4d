//! `hv.toml`: what the hypervisor is to do, as the operator wrote it.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;
use core::ops::RangeInclusive;
use core::str::FromStr;

use serde::Deserialize;
use sld::{Policy, Source};
use vmx::fields::GuestField;
use vmx::vcpu::MAX_OVERRIDES;

use crate::gate;

/// The most VMs that one run has.
pub const MAX_VMS: usize = 64;
/// Smallest and largest guest memory in MiB.
const MEMORY_MIB: RangeInclusive<u64> = 2..=1 << 20;
/// The most vCPUs that one VM has.
pub const MAX_VCPUS: u32 = gate::MEMBERS as u32;
/// How many vCPUs one VM has.
const VCPUS: RangeInclusive<u32> = 1..=MAX_VCPUS;
/// Smallest and largest weight of a VM.
const WEIGHT: RangeInclusive<u32> = 1..=1000;
/// The longest VM name.
pub const MAX_NAME: usize = 31;

/// What becomes of the machine when all VMs have ended, or the hypervisor cannot run.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum AtEnd {
    /// It shows what was, until a key is pressed: then it starts again.
    #[default]
    Stay,
    /// It is switched off.
    PowerOff,
    /// It starts again.
    Reboot,
}

impl AtEnd {
    /// Its name in the file.
    fn named(name: &str) -> Option<Self> {
        match name {
            "stay" => Some(Self::Stay),
            "power-off" => Some(Self::PowerOff),
            "reboot" => Some(Self::Reboot),
            _ => None,
        }
    }

    /// What a file says, also one that cannot be used for other reasons.
    pub fn of_file(text: &[u8]) -> Self {
        #[derive(Deserialize)]
        struct Part {
            #[serde(default, deserialize_with = "at_end")]
            at_end: AtEnd,
        }
        let text = core::str::from_utf8(text).ok();
        text.and_then(|text| toml::from_str(text).ok()).map_or(Self::Stay, |part: Part| part.at_end)
    }
}

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// What is done when a guest splits a lock; the host's mode follows from it.
    #[serde(deserialize_with = "parsed")]
    pub sld: Policy,
    /// Where split locks of VMs that say nothing are detected.
    #[serde(default, deserialize_with = "parsed")]
    pub source: Source,
    /// How long a vCPU runs before the next one's turn, in ticks of the TSC.
    #[serde(default = "default_slice")]
    pub slice_ticks: u64,
    /// How many CPUs are used at most; all if absent.
    #[serde(default)]
    pub cpus: Option<u32>,
    /// Whether the invariants are checked at each vCPU load, put and task switch.
    #[serde(default)]
    pub verify: bool,
    /// Whether each vCPU load and put is an event.
    #[serde(default)]
    pub schedule_events: bool,
    /// A vCPU that had so many exits or more since it came to its CPU is sent on to the next one at
    /// the end of its turn; none is if absent.
    #[serde(default)]
    pub migrate_exits: Option<u64>,
    /// All VMs are ended once so many vCPU loads have happened; never if absent.
    #[serde(default)]
    pub stop_after_loads: Option<u64>,
    /// What becomes of the machine at the end.
    #[serde(default, deserialize_with = "at_end")]
    pub at_end: AtEnd,
    /// Whether the serial ports that have the log take commands.
    #[serde(default)]
    pub console: bool,
    /// The VMs, which all run at the same time.
    #[serde(default, rename = "vm")]
    pub vms: Vec<VmConfig>,
}

/// One `[[vm]]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// A short name, unique, for console, log and events.
    pub name: String,
    /// The image's path in the ramdisk.
    pub image: String,
    /// Memory in MiB, even.
    pub memory_mib: u64,
    /// How many vCPUs it has; [`Self::placement`] checks it.
    #[serde(default = "default_vcpus")]
    pub vcpus: i64,
    /// How much of a CPU's time each vCPU gets, compared with others; [`Self::placement`] checks
    /// it.
    #[serde(default = "default_weight")]
    pub weight: i64,
    /// The CPUs that its vCPUs may run on; all if absent. [`Self::placement`] checks them.
    #[serde(default)]
    pub cpus: Option<Vec<i64>>,
    /// Whether CPUID and IA32_CORE_CAPABILITIES tell the guest that it has the feature.
    #[serde(default)]
    pub expose_sld: bool,
    /// What is done when this guest splits a lock; as in all others if absent.
    #[serde(default, deserialize_with = "optional")]
    pub policy: Option<Policy>,
    /// Where its split locks are detected; as those of all others if absent.
    #[serde(default, deserialize_with = "optional")]
    pub source: Option<Source>,
    /// The VM is ended once one of its vCPUs has run for this many ticks of the TSC; never if absent.
    #[serde(default)]
    pub limit_ticks: Option<u64>,
    /// Fields of the VMCS's guest-state area, by name, that are to have other values at the start.
    #[serde(default)]
    pub vmcs: BTreeMap<String, i64>,
    /// The command line that the guest finds.
    #[serde(default)]
    pub cmdline: String,
}

const fn default_slice() -> u64 {
    1_000_000
}

const fn default_vcpus() -> i64 {
    1
}

const fn default_weight() -> i64 {
    100
}

/// A value that is written as text.
fn parsed<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|error| serde::de::Error::custom(format!("{error}, not `{text}`")))
}

/// The same where the key may be absent.
fn optional<'de, D, T>(deserializer: D) -> Result<Option<T>, D::Error>
where
    D: serde::Deserializer<'de>,
    T: FromStr<Err: fmt::Display>,
{
    parsed(deserializer).map(Some)
}

fn at_end<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<AtEnd, D::Error> {
    let text = String::deserialize(deserializer)?;
    AtEnd::named(&text).ok_or_else(|| {
        let expected = "at_end: use \"stay\", \"power-off\" or \"reboot\"";
        serde::de::Error::custom(format!("{expected}, not `{text}`"))
    })
}

/// What is wrong with the file, in words for the person who wrote it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigError(String);

impl fmt::Display for ConfigError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hv.toml: {}", self.0)
    }
}

impl Config {
    /// Reads and checks the file.
    ///
    /// # Errors
    ///
    /// The first thing that is wrong, with the line where TOML knows it.
    pub fn parse(text: &[u8]) -> Result<Self, ConfigError> {
        let text = core::str::from_utf8(text)
            .map_err(|error| ConfigError(format!("not UTF-8 text: {error}")))?;
        let config: Self = toml::from_str(text).map_err(|error| {
            let line = error.span().map(|span| line_of(text, span.start));
            let place = line.map_or(String::new(), |line| format!("line {line}: "));
            ConfigError(format!("{place}{}", error.message()))
        })?;
        config.check().map_err(ConfigError)?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        if self.vms.is_empty() {
            return Err("no [[vm]]: there is nothing to run".to_string());
        }
        if self.vms.len() > MAX_VMS {
            return Err(format!("{} VMs, at most {MAX_VMS} can run", self.vms.len()));
        }
        if self.slice_ticks == 0 {
            return Err("slice_ticks must be at least 1".to_string());
        }
        if self.cpus == Some(0) {
            return Err("cpus = 0: use at least 1, or leave the key out to use all".to_string());
        }
        if self.migrate_exits == Some(0) {
            return Err("migrate_exits = 0: use at least 1, or leave the key out".to_string());
        }
        if self.stop_after_loads == Some(0) {
            return Err("stop_after_loads = 0: use at least 1, or leave the key out".to_string());
        }
        for (index, vm) in self.vms.iter().enumerate() {
            vm.check()?;
            if self.vms[..index].iter().any(|other| other.name == vm.name) {
                return Err(format!("two VMs are named `{}`", vm.name));
            }
        }
        Ok(())
    }
}

impl VmConfig {
    fn check(&self) -> Result<(), String> {
        let name = &self.name;
        let good = |c: char| c.is_ascii_alphanumeric() || "._-".contains(c);
        if name.is_empty() || name.len() > MAX_NAME || !name.chars().all(good) {
            return Err(format!(
                "VM name `{name}`: use 1 to {MAX_NAME} letters, digits, dots, dashes, underscores"
            ));
        }
        if !MEMORY_MIB.contains(&self.memory_mib) || !self.memory_mib.is_multiple_of(2) {
            return Err(format!(
                "VM `{name}`: memory_mib = {} must be an even number from {} to {}",
                self.memory_mib,
                MEMORY_MIB.start(),
                MEMORY_MIB.end(),
            ));
        }
        if self.vmcs.len() > MAX_OVERRIDES {
            return Err(format!("VM `{name}`: at most {MAX_OVERRIDES} fields in vmcs"));
        }
        match self.vmcs.keys().find(|field| GuestField::named(field).is_none()) {
            Some(field) => Err(format!(
                "VM `{name}`: vmcs: `{field}` is no field of the guest-state area; use names such \
                 as GUEST_RFLAGS"
            )),
            None => Ok(()),
        }
    }

    /// How many vCPUs it has and where they run. Bit n of `online` is set where CPU n runs.
    ///
    /// # Errors
    ///
    /// What this machine or any other cannot do. The VM cannot start; other VMs are not concerned.
    pub fn placement(&self, online: u64) -> Result<Placement, PlacementError> {
        let within = |value: i64, range: &RangeInclusive<u32>| {
            u32::try_from(value).ok().filter(|value| range.contains(value))
        };
        let vcpus = within(self.vcpus, &VCPUS).ok_or(PlacementError::Vcpus(self.vcpus))?;
        let weight = within(self.weight, &WEIGHT).ok_or(PlacementError::Weight(self.weight))?;
        let Some(list) = &self.cpus else {
            return Ok(Placement { vcpus, weight, cpus: online });
        };
        let mut cpus = 0;
        for &cpu in list {
            let bit = u32::try_from(cpu).ok().and_then(|cpu| 1u64.checked_shl(cpu));
            cpus |= bit.filter(|bit| online & bit != 0).ok_or_else(|| PlacementError::Absent {
                list: list.clone(),
                cpu,
                online,
            })?;
        }
        if cpus == 0 {
            return Err(PlacementError::NoCpus);
        }
        Ok(Placement { vcpus, weight, cpus })
    }

    /// [`Self::vmcs`] with the names resolved.
    pub fn overrides(&self) -> [Option<(GuestField, u64)>; MAX_OVERRIDES] {
        let mut fields = self
            .vmcs
            .iter()
            .filter_map(|(name, value)| Some((GuestField::named(name)?, value.cast_unsigned())));
        core::array::from_fn(|_| fields.next())
    }
}

/// How many vCPUs a VM has and where they run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Placement {
    /// 1 to [`MAX_VCPUS`].
    pub vcpus: u32,
    /// 1 to 1000.
    pub weight: u32,
    /// The CPUs that they may run on: bit n for CPU n. Not 0, and all of them are online.
    pub cpus: u64,
}

/// Why a VM's vCPUs cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PlacementError {
    /// `vcpus` is out of range.
    Vcpus(i64),
    /// `weight` is out of range.
    Weight(i64),
    /// `cpus` is empty.
    NoCpus,
    /// One of `cpus` does not run.
    Absent {
        /// `cpus`.
        list: Vec<i64>,
        /// The first one that does not run.
        cpu: i64,
        /// Those that do: bit n for CPU n.
        online: u64,
    },
}

impl fmt::Display for PlacementError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vcpus(vcpus) => write!(f, "vcpus = {vcpus}: a VM has 1 to {MAX_VCPUS}"),
            Self::Weight(weight) => write!(
                f,
                "weight = {weight}: use {} to {}, 100 is the usual one",
                WEIGHT.start(),
                WEIGHT.end()
            ),
            Self::NoCpus => f.write_str("cpus = []: name at least one CPU, or leave the key out"),
            Self::Absent { list, cpu, online } => {
                write!(f, "cpus = {list:?}: there is no CPU {cpu}, this machine runs with ")?;
                write_cpus(f, *online)
            }
        }
    }
}

/// Writes the CPUs of a mask as "CPU 0" or "CPUs 0 to 3, 5".
fn write_cpus(f: &mut fmt::Formatter<'_>, mut mask: u64) -> fmt::Result {
    let mut separator = if mask.count_ones() == 1 { "CPU " } else { "CPUs " };
    while mask != 0 {
        let first = mask.trailing_zeros();
        let length = (mask >> first).trailing_ones();
        write!(f, "{separator}{first}")?;
        if length > 1 {
            write!(f, " to {}", first + length - 1)?;
        }
        separator = ", ";
        // Adding the lowest bit of a run of ones carries it to the bit above the run.
        mask &= mask.wrapping_add(1 << first);
    }
    Ok(())
}

fn line_of(text: &str, offset: usize) -> usize {
    1 + text.bytes().take(offset).filter(|byte| *byte == b'\n').count()
}

#[cfg(test)]
mod tests {
    use super::*;

    const VM: &str = "[[vm]]\nname = \"a\"\nimage = \"guests/a\"\nmemory_mib = 8\n";

    fn error(text: &str) -> String {
        Config::parse(text.as_bytes()).unwrap_err().to_string()
    }

    #[test]
    fn a_full_file() {
        let text = format!(
            "sld = \"fatal\"\nslice_ticks = 5\n{VM}expose_sld = true\npolicy = \"fatal\"\ncmdline = \"x y\"\n"
        );
        let config = Config::parse(text.as_bytes()).unwrap();
        assert_eq!((config.sld, config.slice_ticks), (Policy::Fatal, 5));
        let vm = &config.vms[0];
        assert_eq!((vm.memory_mib, vm.expose_sld, vm.cmdline.as_str()), (8, true, "x y"));
        assert_eq!(vm.policy, Some(Policy::Fatal));
    }

    #[test]
    fn fields_are_overridden_by_name() {
        let text = format!("sld = \"warn\"\n{VM}vmcs = {{ GUEST_RFLAGS = -1 }}\n");
        let config = Config::parse(text.as_bytes()).unwrap();
        let rflags = GuestField::named("GUEST_RFLAGS").unwrap();
        assert_eq!(config.vms[0].overrides()[..2], [Some((rflags, u64::MAX)), None]);
    }

    #[test]
    fn defaults() {
        let config = Config::parse(format!("sld = \"warn\"\n{VM}").as_bytes()).unwrap();
        assert!(!config.vms[0].expose_sld && config.vms[0].policy.is_none() && !config.console);
        assert_eq!((config.source, config.vms[0].source), (Source::Auto, None));
        let text = format!("sld = \"warn\"\nconsole = true\n{VM}");
        assert!(Config::parse(text.as_bytes()).unwrap().console);
    }

    #[test]
    fn sources() {
        let text = format!("sld = \"warn\"\nsource = \"none\"\n{VM}source = \"trace\"\n");
        let config = Config::parse(text.as_bytes()).unwrap();
        assert_eq!((config.source, config.vms[0].source), (Source::None, Some(Source::Trace)));
        let wrong = error(&format!("sld = \"warn\"\n{VM}source = \"mtf\"\n"));
        assert!(wrong.contains("line 6") && wrong.contains("use auto, msr, trace or none"));
    }

    #[test]
    fn smp_keys() {
        let config = Config::parse(format!("sld = \"warn\"\n{VM}").as_bytes()).unwrap();
        assert_eq!((config.cpus, config.verify), (None, false));
        assert!(!config.schedule_events);
        assert_eq!((config.migrate_exits, config.stop_after_loads), (None, None));
        let text = format!(
            "sld = \"warn\"\ncpus = 3\nverify = true\nschedule_events = true\nmigrate_exits = 40\n\
             stop_after_loads = 5\n{VM}vcpus = 2\nweight = 7\ncpus = [2, 0]\n"
        );
        let config = Config::parse(text.as_bytes()).unwrap();
        assert_eq!((config.cpus, config.verify), (Some(3), true));
        assert!(config.schedule_events);
        assert_eq!((config.migrate_exits, config.stop_after_loads), (Some(40), Some(5)));
        let placement = config.vms[0].placement(0b1101);
        assert_eq!(placement, Ok(Placement { vcpus: 2, weight: 7, cpus: 0b101 }));
        for key in ["cpus", "migrate_exits", "stop_after_loads"] {
            let error = error(&format!("sld = \"warn\"\n{key} = 0\n{VM}"));
            assert!(error.contains(&format!("{key} = 0: use at least 1")), "{error}");
        }
        assert!(error(&format!("sld = \"warn\"\n{VM}cpus = 1\n")).contains("line 6"));
    }

    #[test]
    fn the_end_is_as_the_file_says_even_if_nothing_else_can_be_read() {
        let parsed = |key: &str| {
            let text = format!("sld = \"warn\"\n{key}\n{VM}");
            let config = Config::parse(text.as_bytes()).map(|config| config.at_end);
            (config.ok(), AtEnd::of_file(text.as_bytes()))
        };
        assert_eq!(parsed(""), (Some(AtEnd::Stay), AtEnd::Stay));
        for (name, at_end) in
            [("stay", AtEnd::Stay), ("power-off", AtEnd::PowerOff), ("reboot", AtEnd::Reboot)]
        {
            assert_eq!(parsed(&format!("at_end = \"{name}\"")), (Some(at_end), at_end));
            let bad = format!("sld = \"loud\"\nat_end = \"{name}\"\ncolour = 1\n");
            assert_eq!(AtEnd::of_file(bad.as_bytes()), at_end);
        }
        assert_eq!(parsed("at_end = \"off\""), (None, AtEnd::Stay));
        assert_eq!(parsed("at_end = 1"), (None, AtEnd::Stay));
        assert_eq!(AtEnd::of_file(b"at_end = \"reboot\"\n]"), AtEnd::Stay);
        assert_eq!(AtEnd::of_file(b"\xff"), AtEnd::Stay);
        let wrong = error(&format!("at_end = \"off\"\nsld = \"warn\"\n{VM}"));
        assert!(wrong.contains("line 1: at_end: use \"stay\", \"power-off\" or \"reboot\""));
    }

    #[test]
    fn a_placement_that_cannot_be_is_refused_and_the_file_is_not() {
        let place = |keys: &str, online| {
            let text = format!("sld = \"warn\"\n{VM}{keys}\n");
            let config = Config::parse(text.as_bytes()).unwrap();
            config.vms[0].placement(online).map_err(|error| error.to_string())
        };
        let all = u64::MAX;
        assert_eq!(place("", 0xf), Ok(Placement { vcpus: 1, weight: 100, cpus: 0xf }));
        assert!(place("vcpus = 16\nweight = 1", all).is_ok());
        assert!(place("weight = 1000\ncpus = [63, 63]", all).is_ok_and(|p| p.cpus == 1 << 63));
        for (keys, online, message) in [
            ("vcpus = 17", 0xf, "vcpus = 17: a VM has 1 to 16"),
            ("vcpus = 0", 0xf, "vcpus = 0: a VM has 1 to 16"),
            ("vcpus = -1", 0xf, "vcpus = -1: a VM has 1 to 16"),
            ("vcpus = 4294967297", 0xf, "vcpus = 4294967297: a VM has 1 to 16"),
            ("weight = 0", 0xf, "weight = 0: use 1 to 1000, 100 is the usual one"),
            ("weight = 1001", 0xf, "weight = 1001: use 1 to 1000, 100 is the usual one"),
            ("cpus = []", 0xf, "cpus = []: name at least one CPU, or leave the key out"),
            (
                "cpus = [0, 9]",
                0xf,
                "cpus = [0, 9]: there is no CPU 9, this machine runs with CPUs 0 to 3",
            ),
            ("cpus = [-1]", 1, "cpus = [-1]: there is no CPU -1, this machine runs with CPU 0"),
            (
                "cpus = [64]",
                all,
                "cpus = [64]: there is no CPU 64, this machine runs with CPUs 0 to 63",
            ),
            (
                "cpus = [1]",
                1 << 63 | 0b1_1101,
                "cpus = [1]: there is no CPU 1, this machine runs with CPUs 0, 2 to 4, 63",
            ),
        ] {
            assert_eq!(place(keys, online), Err(message.to_string()));
        }
    }

    #[test]
    fn errors_name_the_line_and_say_what_to_do() {
        assert!(error(&format!("sld = \"loud\"\n{VM}")).contains("use off, warn, step"));
        assert!(error(&format!("sld = \"loud\"\n{VM}")).contains("line 1"));
        assert!(error("sld = \"warn\"\n").contains("nothing to run"));
        assert!(error(&format!("sld = \"warn\"\ncolour = 1\n{VM}")).contains("colour"));
        assert!(error(&format!("sld = \"warn\"\n{VM}{VM}")).contains("two VMs"));
        assert!(error(&format!("sld = \"warn\"\nslice_ticks = 0\n{VM}")).contains("slice_ticks"));
        let odd = VM.replace('8', "7");
        assert!(error(&format!("sld = \"warn\"\n{odd}")).contains("even number"));
        let name = VM.replace("\"a\"", "\"a b\"");
        assert!(error(&format!("sld = \"warn\"\n{name}")).contains("VM name"));
        let host = format!("sld = \"warn\"\n{VM}vmcs = {{ HOST_RIP = 1 }}\n");
        assert!(error(&host).contains("no field of the guest-state area"));
        assert!(Config::parse(b"\xff").unwrap_err().to_string().contains("UTF-8"));
    }
}
