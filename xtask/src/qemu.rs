//! QEMU: where it is, whether KVM can run a hypervisor in it, and the machine's command line.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{self, Root};
use crate::console;
use crate::machine::{Accelerator, MachineConfig};
use crate::topology::Topology;

/// A QEMU that can be used.
#[derive(Clone, Debug)]
pub enum Qemu {
    /// Of the host.
    Host(PathBuf),
    /// Of the cache.
    Cache(Root),
}

const PROGRAM: &str = "qemu-system-x86_64";

impl Qemu {
    /// The host's QEMU or the cached one, if one is there.
    pub fn existing() -> Option<Self> {
        let host = cache::in_path(PROGRAM).map(Self::Host);
        host.or_else(|| cache::existing().map(Self::Cache))
    }

    /// As [`existing`](Self::existing), or the cached one, fetched now.
    ///
    /// # Errors
    /// If there is none and none can be fetched.
    pub fn ensure() -> Result<Self> {
        let qemu = match Self::existing() {
            Some(qemu) => qemu,
            None => Self::Cache(cache::ensure()?),
        };
        console::verbose(&qemu.version()?);
        Ok(qemu)
    }

    /// First line of what it says about its version.
    ///
    /// # Errors
    /// If it does not run.
    pub fn version(&self) -> Result<String> {
        let mut command = self.command();
        let output = console::capture(command.arg("--version"))?;
        let text = String::from_utf8_lossy(&output.stdout);
        match text.lines().next() {
            Some(line) if output.status.success() => Ok(line.to_owned()),
            _ => {
                bail!("{}: {}", console::render(&command), String::from_utf8_lossy(&output.stderr))
            }
        }
    }

    /// A command that runs it with its firmware found.
    fn command(&self) -> Command {
        match self {
            Self::Host(program) => Command::new(program),
            Self::Cache(root) => {
                let mut command = root.command(&format!("usr/bin/{PROGRAM}"), None);
                for firmware in ["usr/share/seabios", "usr/share/qemu"] {
                    command.arg("-L").arg(root.path().join(firmware));
                }
                command
            }
        }
    }

    /// The command that runs the machine, in its directory.
    pub fn machine(
        &self,
        config: &MachineConfig,
        accelerator: Accelerator,
        disk: &str,
        serial: [&str; 2],
    ) -> Command {
        let mut command = self.command();
        let (accelerator, cpu) = match accelerator {
            Accelerator::Kvm => ("kvm", "host"),
            Accelerator::Tcg => ("tcg", "max"),
        };
        let Topology { packages, cores, threads } = config.cpus;
        command
            .args(["-accel", accelerator, "-cpu", cpu])
            .args(["-smp", &format!("sockets={packages},cores={cores},threads={threads}")])
            .args(["-m", &config.memory_mib.to_string()])
            .args(["-drive", &format!("file={disk},format=raw,if=ide")])
            .args(["-display", "none", "-monitor", "none", "-nic", "none", "-no-reboot"]);
        for file in serial {
            command.args(["-serial", &format!("file:{file}")]);
        }
        command
    }
}

/// Whether KVM lets a guest use VT-x.
///
/// # Errors
/// Why not, in words for `doctor`.
pub fn nested_kvm() -> Result<()> {
    let cpuinfo = fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo cannot be read")?;
    if !has_vmx(&cpuinfo) {
        bail!("the CPU shows no VT-x (flag vmx in /proc/cpuinfo)");
    }
    let switch = Path::new("/sys/module/kvm_intel/parameters/nested");
    let nested = fs::read_to_string(switch).context("the module kvm_intel is not loaded")?;
    if !matches!(nested.trim(), "Y" | "1") {
        bail!("nested virtualization is off: load kvm_intel with nested=1");
    }
    let device = fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    device.context("/dev/kvm cannot be used: add yourself to the group kvm")?;
    Ok(())
}

fn has_vmx(cpuinfo: &str) -> bool {
    let flags = cpuinfo.lines().filter_map(|line| line.strip_prefix("flags")?.split_once(':'));
    flags.flat_map(|(_, flags)| flags.split_whitespace()).any(|flag| flag == "vmx")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vt_x_is_a_flag_of_the_cpu() {
        assert!(has_vmx("processor : 0\nflags\t\t: fpu vmx ssse3\n"));
        assert!(!has_vmx("processor : 0\nflags\t\t: fpu svm ssse3\n"));
        assert!(!has_vmx("vmx flags\t: vnmi\nflags\t\t: fpu vmx_like\nmodel name : vmx\n"));
    }

    #[test]
    fn the_command_line_says_what_was_asked_for() {
        let cpus = Topology { packages: 1, cores: 3, threads: 2 };
        let config = MachineConfig { cpus, memory_mib: 300, ..MachineConfig::default() };
        let qemu = Qemu::Host(PathBuf::from("qemu"));
        let shown = console::render(&qemu.machine(
            &config,
            Accelerator::Tcg,
            "disk.img",
            ["a.txt", "b.txt"],
        ));
        assert!(shown.contains("-accel tcg -cpu max "), "{shown}");
        assert!(shown.contains(" -smp sockets=1,cores=3,threads=2 -m 300 "), "{shown}");
        assert!(shown.contains("file=disk.img,format=raw"), "{shown}");
        assert!(shown.ends_with("-serial file:a.txt -serial file:b.txt"), "{shown}");
    }
}
