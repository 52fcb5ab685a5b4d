//! QEMU: where it is, whether KVM can run a hypervisor in it, and the machine's command line.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::cache::{self, Root};
use crate::console;
use crate::firmware::{Firmware, Uefi};
use crate::machine::{Accelerator, DiskBus, MachineConfig};
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
/// The machine's own copy of its firmware's variables.
const VARIABLES: &str = "uefi-variables.fd";

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
    pub(crate) fn command(&self) -> Command {
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

    /// Puts UEFI firmware for a machine into its directory, if it has UEFI.
    ///
    /// # Errors
    /// If there is none and none can be fetched, or if it cannot be copied.
    pub fn install_firmware(
        &self,
        config: &MachineConfig,
        directory: &Path,
    ) -> Result<Option<Uefi>> {
        if config.firmware == Firmware::Bios {
            return Ok(None);
        }
        let uefi = Uefi::ensure(matches!(self, Self::Host(_)))?;
        console::verbose(&format!("UEFI firmware: {uefi}"));
        let variables = PathBuf::from(VARIABLES);
        let bytes = fs::read(&uefi.variables)
            .with_context(|| format!("cannot read {}", uefi.variables.display()))?;
        fs::write(directory.join(&variables), bytes)?;
        Ok(Some(Uefi { variables, ..uefi }))
    }

    /// The command that runs the machine, in its directory. `uefi` is its firmware, if it has UEFI. With a `port`,
    /// the first serial port is connected to that one on this host, else it is a file.
    pub fn machine(
        &self,
        config: &MachineConfig,
        accelerator: Accelerator,
        uefi: Option<&Uefi>,
        disk: &str,
        serial: [&str; 2],
        port: Option<u16>,
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
            .args(["-display", "none", "-monitor", "none", "-nic", "none"]);
        if let Some(Uefi { code, variables }) = uefi {
            let flash = |unit, file: &Path, rights| {
                let file = file.display();
                format!("if=pflash,unit={unit},format=raw,file={file}{rights}")
            };
            command.args(["-drive", &flash(0, code, ",readonly=on")]);
            command.args(["-drive", &flash(1, variables, "")]);
        }
        let drive = format!("file={disk},format=raw");
        match config.bus {
            DiskBus::Ide => command.args(["-drive", &format!("{drive},if=ide")]),
            DiskBus::Usb => command
                .args(["-drive", &format!("{drive},if=none,id=stick"), "-device", "qemu-xhci"])
                .args(["-device", "usb-storage,drive=stick,removable=on,bootindex=0"]),
        };
        let mut serial = serial.map(|file| format!("file:{file}"));
        if let Some(port) = port {
            serial[0] = format!("tcp:127.0.0.1:{port}");
        }
        for serial in &serial {
            command.args(["-serial", serial]);
        }
        command.args(&config.qemu_arguments);
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
        let render = |config: &MachineConfig, uefi: Option<&Uefi>| {
            let serial = ["a.txt", "b.txt"];
            console::render(&qemu.machine(config, Accelerator::Tcg, uefi, "disk.img", serial, None))
        };
        let tcp = qemu.machine(&config, Accelerator::Tcg, None, "d", ["a.txt", "b.txt"], Some(7));
        let shown = console::render(&tcp);
        assert!(shown.ends_with("-serial tcp:127.0.0.1:7 -serial file:b.txt"), "{shown}");
        let shown = render(&config, None);
        assert!(shown.contains("-accel tcg -cpu max "), "{shown}");
        assert!(shown.contains(" -smp sockets=1,cores=3,threads=2 -m 300 "), "{shown}");
        assert!(shown.contains("-drive file=disk.img,format=raw,if=ide"), "{shown}");
        assert!(shown.ends_with("-serial file:a.txt -serial file:b.txt"), "{shown}");
        assert!(!shown.contains("pflash"), "{shown}");

        let (code, variables) = ("/firmware/code.fd".into(), "mine.fd".into());
        let config = MachineConfig {
            firmware: Firmware::Uefi,
            bus: DiskBus::Usb,
            qemu_arguments: vec!["-S".to_owned()],
            ..config
        };
        let shown = render(&config, Some(&Uefi { code, variables }));
        let flash = "-drive if=pflash,unit=0,format=raw,file=/firmware/code.fd,readonly=on \
                     -drive if=pflash,unit=1,format=raw,file=mine.fd ";
        assert!(shown.contains(flash), "{shown}");
        assert!(shown.contains("-device usb-storage,drive=stick,"), "{shown}");
        assert!(!shown.contains("if=ide") && shown.ends_with(" -S"), "{shown}");
    }
}
