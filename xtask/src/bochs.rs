//! Bochs: where it is, what it can do, and the configuration of the machine that it makes.

use std::fmt::{self, Display, Write};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use object::{Object, ObjectSymbol};

use crate::cache::{self, Root};
use crate::console;
use crate::firmware::{Firmware, Uefi};
use crate::machine::{MachineConfig, Mishap, Quirk};
use crate::topology::Topology;

/// The oldest release that will do: 3.0 lacks UEFI support, 2.7 the monitor trap flag too.
pub const OLDEST: Version = Version(3, 1);

/// Machine time at power on, in seconds since 1970: always the same, for the same run every time.
const BOOT_TIME: u32 = 946_684_800;

/// An MSR that the CPU models lack: number, and value at reset, reserved bits and ignored bits.
pub(crate) type ExtraMsr = (u32, [u64; 3]);

/// What Bochs checks when such an MSR is written, besides the bits: 2, that the value could be a
/// physical address. Status registers hold more.
const fn kind((number, _): ExtraMsr) -> u8 {
    if number < 0x100 { 2 } else { 0 }
}

/// MSRs of a machine with split-lock detection.
///
/// 0x33 (TEST_CTRL) has bit 29 and nothing else; 0xCF (IA32_CORE_CAPABILITIES) says in bit 5 that it works.
pub(crate) fn sld_msrs(quirk: Option<Quirk>) -> Vec<ExtraMsr> {
    const BIT_29: u64 = 1 << 29;
    let (reset, ignored) = match quirk {
        None => (0, 0),
        Some(Quirk::StuckOn) => (BIT_29, BIT_29),
        Some(Quirk::Undeclared) => (BIT_29, 0),
    };
    let mut msrs = vec![(0x33, [reset, !BIT_29, ignored])];
    if quirk != Some(Quirk::Undeclared) {
        msrs.push((0xCF, [1 << 5, u64::MAX, 0]));
    }
    msrs
}

/// MSRs of a machine with two machine-check banks, on which software can recover (MCG_SER_P).
fn machine_check_msrs() -> Vec<ExtraMsr> {
    let capabilities = (0x179, [1 << 24 | 1 << 8 | 2, u64::MAX, 0]);
    let others = [0x17a, 0x17b].into_iter().chain(0x400..0x408).map(|number| (number, [0; 3]));
    [capabilities].into_iter().chain(others).collect()
}

/// MSRs that no CPU model has, but for which firmware may leave a value: SMI_COUNT, MISC_ENABLE.
const FIRMWARE_MSRS: [u32; 2] = [0x34, 0x1a0];

/// All MSRs that a machine has besides its CPU model's.
fn extra_msrs(config: &MachineConfig) -> Vec<ExtraMsr> {
    let left = |number| config.left_over.iter().any(|write| write.number == number);
    let machine_check = matches!(config.mishap, Some(Mishap::MachineCheck(_)))
        || machine_check_msrs().into_iter().any(|(number, _)| left(number));
    let mut msrs = if config.sld { sld_msrs(config.quirk) } else { Vec::new() };
    if machine_check {
        msrs.extend(machine_check_msrs());
    }
    let firmware = FIRMWARE_MSRS.into_iter().filter(|number| left(*number));
    msrs.extend(firmware.map(|number| (number, [0; 3])));
    msrs
}

/// A line of the file of extra MSRs. Every number but the first two has eight digits, the high half before the
/// low one.
pub(crate) fn msr_line(msr @ (number, values): ExtraMsr) -> String {
    let halves = values.map(|value| format!("{:08x} {:08x}", value >> 32, value as u32));
    format!("{number:03x} {} {}\n", kind(msr), halves.join(" "))
}

/// In bochs.log when such a line was read as meant.
fn msr_loaded(msr @ (number, values): ExtraMsr) -> String {
    let halves = values.map(|value| format!("{:08x}:{:08x}", value >> 32, value as u32));
    format!("loaded MSR[0x{number:03x}] type={} {}", kind(msr), halves.join(" "))
}

/// Said on the standard error when the machine powered itself off; the exit status is 1 then as for errors.
const POWERED_OFF: [&str; 2] =
    ["Shutdown port: shutdown requested", "ACPI control: soft power off"];

/// In bochs.log when a CPU shut itself down for a triple fault outside guests.
const TRIPLE_FAULT: &str = "exception with no resolution";

/// Names of the files in the machine's directory.
pub mod file {
    /// The configuration.
    pub const CONFIG: &str = "bochsrc";
    /// Extra MSRs.
    pub const MSRS: &str = "msrs.def";
    /// Bochs' log.
    pub const LOG: &str = "bochs.log";
    /// UEFI firmware.
    pub const UEFI: &str = "uefi.fd";
}

/// Major and minor version.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Version(pub u32, pub u32);

impl Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.0, self.1)
    }
}

impl Version {
    /// Finds the version in Bochs' banner, `Bochs x86 Emulator 3.1` or `… 2.7.1`.
    pub fn in_banner(text: &str) -> Option<Self> {
        let rest = text.split_once("Bochs x86 Emulator ")?.1;
        let mut numbers = rest.split(|c: char| !c.is_ascii_digit()).map(str::parse);
        Some(Self(numbers.next()?.ok()?, numbers.next()?.ok()?))
    }
}

/// A Bochs that can be used.
#[derive(Clone, Debug)]
pub struct Bochs {
    place: Place,
    version: Version,
}

#[derive(Clone, Debug)]
enum Place {
    Host(PathBuf),
    Cache(Root),
}

impl Display for Bochs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let place = match &self.place {
            Place::Host(program) => program,
            Place::Cache(root) => root.path(),
        };
        write!(f, "Bochs {} ({})", self.version, place.display())
    }
}

impl Bochs {
    /// The host's Bochs.
    ///
    /// # Errors
    /// Why there is none that can be used, in words for `doctor`.
    pub fn on_host() -> Result<Self> {
        // Debian's `bochs` is a script around `bochs-bin`; a library can only be loaded into the latter.
        let Some(program) = cache::in_path("bochs-bin").or_else(|| cache::in_path("bochs")) else {
            bail!("not installed");
        };
        let at = program.display().to_string();
        has_hooks(&program).with_context(|| format!("{at} cannot be used"))?;
        for firmware in ["BIOS-bochs-latest", "VGABIOS-lgpl-latest"] {
            let file = Path::new("/usr/share/bochs").join(firmware);
            if !file.exists() {
                bail!("{at} cannot be used: {} is missing", file.display());
            }
        }
        let bochs = Self { place: Place::Host(program), version: OLDEST };
        bochs.ask_version()
    }

    /// The cached Bochs, if it is there.
    ///
    /// # Errors
    /// If it is not, or does not run.
    pub fn in_cache() -> Result<Self> {
        let root = cache::existing().context("not fetched yet")?;
        Self { place: Place::Cache(root), version: OLDEST }.ask_version()
    }

    /// The host's Bochs if it can be used, else the cached one, which is fetched if need be.
    ///
    /// # Errors
    /// If there is none and none can be fetched.
    pub fn ensure() -> Result<Self> {
        let bochs = match Self::on_host() {
            Ok(bochs) => bochs,
            Err(why) => {
                console::verbose(&format!("host's Bochs: {why:#}"));
                let root = cache::ensure()?;
                Self { place: Place::Cache(root), version: OLDEST }.ask_version()?
            }
        };
        console::verbose(&bochs.to_string());
        Ok(bochs)
    }

    /// Fills in the version that the program tells.
    fn ask_version(self) -> Result<Self> {
        let help = self.help(&["--help"])?;
        let version =
            Version::in_banner(&help).with_context(|| format!("no version in: {help}"))?;
        if version < OLDEST {
            bail!("version {version} is too old, {OLDEST} is needed");
        }
        Ok(Self { version, ..self })
    }

    fn help(&self, arguments: &[&str]) -> Result<String> {
        let output = console::capture(self.command(None).args(arguments))?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned()
            + &String::from_utf8_lossy(&output.stderr))
    }

    /// Names of the CPU models.
    ///
    /// # Errors
    /// If Bochs does not tell.
    pub fn models(&self) -> Result<Vec<String>> {
        let models = models_in(&self.help(&["--help", "cpu"])?);
        if models.is_empty() {
            bail!("{self} does not tell its CPU models");
        }
        Ok(models)
    }

    /// A command that runs it, with a library loaded before it.
    pub fn command(&self, preload: Option<&Path>) -> Command {
        let mut command = match &self.place {
            Place::Host(program) => {
                let mut command = Command::new(program);
                if let Some(library) = preload {
                    command.env("LD_PRELOAD", library);
                }
                command
            }
            Place::Cache(root) => {
                let mut command = root.command("usr/bin/bochs-bin", preload);
                command
                    .env("LTDL_LIBRARY_PATH", root.libraries().join("bochs/plugins"))
                    .env("BXSHARE", root.path().join("usr/share/bochs"))
                    .env("TERMINFO", root.path().join("usr/share/terminfo"));
                command
            }
        };
        // Its screen is drawn for a terminal of its own, whatever the user's is, or if there is none.
        command.env("TERM", "vt100");
        command
    }

    /// Writes the machine's configuration into its directory. With a `port`, the first serial port is connected
    /// to that one on this host, else it is a file.
    ///
    /// # Errors
    /// If Bochs lacks the model or cannot arrange so many CPUs, if there is no UEFI firmware for a machine with UEFI, or
    /// if a file cannot be written.
    pub fn configure(
        &self,
        config: &MachineConfig,
        directory: &Path,
        disk: &str,
        serial: [&str; 2],
        port: Option<u16>,
    ) -> Result<()> {
        let models = self.models()?;
        if !models.contains(&config.model) {
            bail!("unknown CPU model {:?}; {self} has: {}", config.model, models.join(" "));
        }
        check_topology(config.cpus)?;
        // The cached firmware also for the host's Bochs: with its hardware, not all builds get on.
        let rom = match config.firmware {
            Firmware::Bios => None,
            Firmware::Uefi => Some(Uefi::ensure(false)?.write_rom(&directory.join(file::UEFI))?),
        };
        fs::write(directory.join(file::CONFIG), bochsrc(config, rom, disk, serial, port))?;
        let msrs = extra_msrs(config);
        if !msrs.is_empty() {
            let lines: String = msrs.into_iter().map(msr_line).collect();
            fs::write(directory.join(file::MSRS), lines)?;
        }
        Ok(())
    }
}

/// Whether the program has the instrumentation hooks that the shim needs. Its own checks are the strict ones; this one
/// tells a build without instrumentation, and a script, before anything is run.
fn has_hooks(program: &Path) -> Result<()> {
    let data = fs::read(program)?;
    let elf = object::File::parse(&*data).context("not an ELF program")?;
    let hook = "_Z19bx_instr_lin_accessjmmjjj";
    if !elf.dynamic_symbols().any(|symbol| symbol.name() == Ok(hook)) {
        bail!("built without instrumentation stubs ({hook})");
    }
    Ok(())
}

/// Whether Bochs can arrange CPUs like that. The bounds are those of 3.1.
fn check_topology(topology: Topology) -> Result<()> {
    /// Its timers: 64, of which each CPU takes four and the machine's devices more than four.
    const CPUS: u64 = 14;
    const CORES: u32 = 8;
    /// It numbers APIC IDs without gaps, but CPUID leaf 0xB gives the thread a whole number of their bits.
    const THREADS: [u32; 3] = [1, 2, 4];

    let Topology { cores, threads, .. } = topology;
    let cpus = topology.cpus();
    ensure!(cpus <= CPUS, "Bochs makes machines of at most {CPUS} CPUs, not {cpus}");
    ensure!(cores <= CORES, "Bochs makes packages of at most {CORES} cores, not {cores}");
    ensure!(
        THREADS.contains(&threads),
        "Bochs makes cores of 1, 2 or 4 threads, not {threads} ({topology})"
    );
    Ok(())
}

/// The list behind "Supported CPU models:", one a line.
fn models_in(help: &str) -> Vec<String> {
    let Some((_, list)) = help.split_once("Supported CPU models:") else {
        return Vec::new();
    };
    let lines = list.lines().map(str::trim).skip_while(|line| line.is_empty());
    lines.take_while(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// The configuration file; `rom` is the address of UEFI firmware. Paths are relative to the machine's directory.
fn bochsrc(
    config: &MachineConfig,
    rom: Option<u64>,
    disk: &str,
    [serial, events]: [&str; 2],
    port: Option<u16>,
) -> String {
    /// Of the machine's memory, in MiB, what Bochs keeps in the host's; it swaps the rest to a file.
    const HOST_MEMORY: u32 = 1024;

    let MachineConfig { model, cpus, memory_mib, ips, .. } = config;
    let has_msrs = !extra_msrs(config).is_empty();
    let msrs = if has_msrs { format!(r#", msrs="{}""#, file::MSRS) } else { String::new() };
    let host = (*memory_mib).min(HOST_MEMORY);
    let rom = match rom {
        None => "romimage: file=$BXSHARE/BIOS-bochs-latest".to_owned(),
        Some(address) => format!(
            "romimage: file={}, address={address:#x}\nfw_cfg: enabled=1\npci: enabled=1, chipset=i440fx",
            file::UEFI
        ),
    };
    // At the other end of the connection, this process: see `link`.
    let serial = match port {
        None => format!("mode=file, dev={serial}"),
        Some(port) => format!("mode=socket-client, dev=127.0.0.1:{port}"),
    };
    let mut text = String::new();
    // A missing MSR must fault as on hardware. No panic may stop and ask. VGA updates by machine time, not by the
    // host's clock, for the same run every time. Without an extension the VGA has no 32-bit modes, which end a Bochs
    // that draws for a terminal.
    let _ = write!(
        text,
        "\
cpu: model={model}, count={cpus}, ips={ips}, reset_on_triple_fault=0, ignore_bad_msrs=0{msrs}
memory: guest={memory_mib}, host={host}
{rom}
vgaromimage: file=$BXSHARE/VGABIOS-lgpl-latest
vga: extension=none, update_freq=5, realtime=0
ata0-master: type=disk, path={disk}, mode=flat
boot: disk
com1: enabled=1, {serial}
com2: enabled=1, mode=file, dev={events}
clock: sync=none, time0={BOOT_TIME}
log: {log}
panic: action=fatal
display_library: term
speaker: enabled=0
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
",
        log = file::LOG,
    );
    text
}

/// Whether what Bochs said on its standard error means that the machine powered itself off.
pub fn powered_off(said: &str) -> bool {
    POWERED_OFF.iter().any(|message| said.contains(message))
}

/// Whether the log tells of a triple fault outside guests.
pub fn cpu_shut_down(log: &str) -> bool {
    log.contains(TRIPLE_FAULT)
}

/// Checks by the log that the machine had the MSRs that it was to have.
///
/// # Errors
/// If one was not loaded as meant: such a run proves nothing.
pub fn check_msrs(config: &MachineConfig, log: &str) -> Result<()> {
    match extra_msrs(config).into_iter().map(msr_loaded).find(|line| !log.contains(line)) {
        Some(line) => bail!("Bochs did not load an MSR as meant; its log lacks {line:?}"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_and_ordered() {
        let version = |text: &str| Version::in_banner(text);
        assert_eq!(version("===\n      Bochs x86 Emulator 3.1\n  Built from"), Some(Version(3, 1)));
        assert_eq!(version("Bochs x86 Emulator 2.7"), Some(Version(2, 7)));
        assert_eq!(version("Bochs x86 Emulator 3.1.1"), Some(Version(3, 1)));
        assert_eq!(version("Bochs x86 Emulator 3.12.devel"), Some(Version(3, 12)));
        assert_eq!(version("Bochs x86 Emulator soon"), None);
        assert_eq!(version("bochs: command not found"), None);
        assert!(Version(3, 0) < OLDEST && Version(2, 11) < OLDEST && Version(3, 10) > OLDEST);
    }

    #[test]
    fn models_are_listed() {
        let help = "log\nSupported CPU models:\n\ni386\narrow_lake\n\n0000i[SIM   ] quit_sim\n";
        assert_eq!(models_in(help), ["i386", "arrow_lake"]);
        assert!(models_in("Usage: bochs [flags]").is_empty());
    }

    #[test]
    fn machines_that_bochs_cannot_make_are_refused() {
        let check = |text: &str| check_topology(text.parse().unwrap());
        for text in ["1", "14", "1:2:2", "1:8:1", "3:1:4"] {
            assert!(check(text).is_ok(), "{text}");
        }
        for (text, why) in [
            ("15", "at most 14 CPUs, not 15"),
            ("2:8:4", "at most 14 CPUs, not 64"),
            ("1:9:1", "at most 8 cores, not 9"),
            ("2:1:3", "1, 2 or 4 threads, not 3"),
            ("1:1:8", "1, 2 or 4 threads, not 8"),
        ] {
            let refused = check(text).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
        }
    }

    #[test]
    fn the_configuration_says_what_was_asked_for() {
        let config = MachineConfig {
            model: "tigerlake".to_owned(),
            cpus: 4.into(),
            memory_mib: 512,
            ..MachineConfig::default()
        };
        let text = bochsrc(&config, None, "disk.img", ["one.txt", "two.txt"], None);
        assert!(text.contains("cpu: model=tigerlake, count=4, "), "{text}");
        assert!(text.contains(r#", msrs="msrs.def""#), "{text}");
        assert!(text.contains("memory: guest=512, host=512\n"), "{text}");
        assert!(text.contains("path=disk.img,"), "{text}");
        assert!(text.contains("com1: enabled=1, mode=file, dev=one.txt\n"), "{text}");
        assert!(text.contains("com2: enabled=1, mode=file, dev=two.txt\n"), "{text}");

        assert!(text.contains("romimage: file=$BXSHARE/BIOS-bochs-latest\n"), "{text}");

        let with = |config: MachineConfig, rom| bochsrc(&config, rom, "d", ["1", "2"], None);
        let without = with(MachineConfig { sld: false, ..config.clone() }, None);
        assert!(!without.contains("msrs.def"), "{without}");
        let uefi = with(config.clone(), Some(0xffc0_0000));
        assert!(uefi.contains("romimage: file=uefi.fd, address=0xffc00000\n"), "{uefi}");
        assert!(uefi.contains("fw_cfg: enabled=1\n") && !uefi.contains("BIOS-bochs"), "{uefi}");
        let smt = MachineConfig { cpus: "1:2:2".parse().unwrap(), ..config.clone() };
        assert!(with(smt, None).contains("count=1:2:2, "));
        let large = with(MachineConfig { memory_mib: 6144, ..config }, None);
        assert!(large.contains("memory: guest=6144, host=1024\n"), "{large}");
    }

    fn msr_lines(quirk: Option<Quirk>) -> String {
        sld_msrs(quirk).into_iter().map(msr_line).collect()
    }

    #[test]
    fn the_msr_file_is_in_the_form_that_bochs_wants() {
        let test_ctrl = "033 2 00000000 00000000 ffffffff dfffffff 00000000 00000000\n";
        let capabilities = "0cf 2 00000000 00000020 ffffffff ffffffff 00000000 00000000\n";
        assert_eq!(msr_lines(None), format!("{test_ctrl}{capabilities}"));
        let stuck = "033 2 00000000 20000000 ffffffff dfffffff 00000000 20000000\n";
        assert_eq!(msr_lines(Some(Quirk::StuckOn)), format!("{stuck}{capabilities}"));
        let set = "033 2 00000000 20000000 ffffffff dfffffff 00000000 00000000\n";
        assert_eq!(msr_lines(Some(Quirk::Undeclared)), set);
    }

    #[test]
    fn a_machine_without_the_msrs_is_noticed() {
        let log = "\
            loaded MSR[0x033] type=2 00000000:00000000 ffffffff:dfffffff 00000000:00000000\n\
            loaded MSR[0x0cf] type=2 00000000:00000020 ffffffff:ffffffff 00000000:00000000\n";
        let check = |log: &str| check_msrs(&MachineConfig::default(), log);
        assert!(check(log).is_ok());
        assert!(check(log.lines().next().unwrap()).is_err());
        assert!(check(&log.replace("dfffffff", "ffffffff")).is_err());
        let stuck = MachineConfig { quirk: Some(Quirk::StuckOn), ..MachineConfig::default() };
        assert!(check_msrs(&stuck, log).is_err());
    }
}
