//! `hv.toml`: what the hypervisor is to do, as the operator wrote it.

use alloc::collections::BTreeMap;
use alloc::format;
use alloc::string::{String, ToString};
use alloc::vec::Vec;
use core::fmt;

use serde::Deserialize;
use sld::SldMode;
use vmx::fields::GuestField;
use vmx::vcpu::MAX_OVERRIDES;

/// The most VMs that one run has.
pub const MAX_VMS: usize = 64;
/// Smallest and largest guest memory in MiB.
const MEMORY_MIB: core::ops::RangeInclusive<u64> = 2..=1 << 20;
/// The longest VM name.
const MAX_NAME: usize = 31;

/// The whole file.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// The host's mode.
    #[serde(deserialize_with = "mode")]
    pub sld: SldMode,
    /// How long a vCPU runs before the next one's turn, in ticks of the TSC.
    #[serde(default = "default_slice")]
    pub slice_ticks: u64,
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
    /// Whether CPUID and IA32_CORE_CAPABILITIES tell the guest that it has the feature.
    #[serde(default)]
    pub expose_sld: bool,
    /// What is done when the guest splits a lock; the host's mode if absent.
    #[serde(default, deserialize_with = "optional_mode")]
    pub policy: Option<SldMode>,
    /// The VM is ended once it has run for this many ticks of the TSC; never if absent.
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

fn mode<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<SldMode, D::Error> {
    let text = String::deserialize(deserializer)?;
    text.parse().map_err(|error| serde::de::Error::custom(format!("{error}, not `{text}`")))
}

fn optional_mode<'de, D>(deserializer: D) -> Result<Option<SldMode>, D::Error>
where
    D: serde::Deserializer<'de>,
{
    mode(deserializer).map(Some)
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

    /// [`Self::vmcs`] with the names resolved.
    pub fn overrides(&self) -> [Option<(GuestField, u64)>; MAX_OVERRIDES] {
        let mut fields = self
            .vmcs
            .iter()
            .filter_map(|(name, value)| Some((GuestField::named(name)?, value.cast_unsigned())));
        core::array::from_fn(|_| fields.next())
    }
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
        assert_eq!((config.sld, config.slice_ticks), (SldMode::Fatal, 5));
        let vm = &config.vms[0];
        assert_eq!((vm.memory_mib, vm.expose_sld, vm.cmdline.as_str()), (8, true, "x y"));
        assert_eq!(vm.policy, Some(SldMode::Fatal));
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
        assert!(!config.vms[0].expose_sld && config.vms[0].policy.is_none());
    }

    #[test]
    fn errors_name_the_line_and_say_what_to_do() {
        assert!(error(&format!("sld = \"loud\"\n{VM}")).contains("use off, warn or fatal"));
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
