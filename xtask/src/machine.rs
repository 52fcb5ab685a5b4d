//! Runs one machine to its end and collects what it said.

use std::fmt::{self, Display};
use std::fs::{self, File};
use std::io::Read;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};
use std::{io, process, thread};

use anyhow::{Context, Result, bail};

use crate::bochs::{self, Bochs};
use crate::console;
use crate::events::{self, Body, Event, Truth};
use crate::firmware::{Firmware, Plain};
pub use crate::link::{Input, Reply};
use crate::link::{Link, Port};
use crate::qemu::{self, Qemu};
use crate::shim;
use crate::terminal::Terminal;
use crate::topology::Topology;

/// Which emulator makes the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Emulator {
    /// Bochs with the split-lock shim.
    Bochs,
    /// QEMU, whose CPU has VT-x if KVM gives it.
    Qemu(Accelerator),
}

/// What runs QEMU's CPUs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Accelerator {
    /// The host's VT-x, which the machine gets too if nested virtualization is on.
    Kvm,
    /// QEMU itself, without VT-x for the machine.
    Tcg,
}

impl Emulator {
    /// QEMU where KVM lets a guest use VT-x, else Bochs.
    pub fn best() -> Self {
        match Self::qemu() {
            with_vtx @ Self::Qemu(Accelerator::Kvm) => with_vtx,
            _ => Self::Bochs,
        }
    }

    /// QEMU, with VT-x if that can be had.
    pub fn qemu() -> Self {
        let usable = qemu::nested_kvm().is_ok();
        Self::Qemu(if usable { Accelerator::Kvm } else { Accelerator::Tcg })
    }
}

/// What MSR 0x33 belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SldScope {
    /// Every thread has its own.
    Thread,
    /// The threads of a core share one, as in hardware.
    Core,
}

/// What is odd about the CPUs' split-lock detection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quirk {
    /// Bit 29 of MSR 0x33 is set, and whatever is written it stays.
    StuckOn,
    /// Bit 29 is set since reset, but MSR 0xCF does not exist: nothing says that there is detection.
    Undeclared,
}

/// How the disk is connected.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DiskBus {
    /// As a PC's internal disk.
    #[default]
    Ide,
    /// As a stick (QEMU only).
    Usb,
}

/// A value that is written to an MSR.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MsrWrite {
    /// On this CPU only.
    pub cpu: Option<u32>,
    /// Its number.
    pub number: u32,
    /// The value.
    pub value: u64,
}

/// What befalls the machine when a guest splits a lock for the first time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Mishap {
    /// An NMI that no CPU has sent.
    Nmi,
    /// A machine check on that CPU, with these values in its machine-check MSRs. The access is not made.
    MachineCheck(Vec<MsrWrite>),
}

/// A machine.
#[derive(Clone, Debug)]
pub struct MachineConfig {
    /// What makes it.
    pub emulator: Emulator,
    /// Disk image that it boots; the machine works on a copy.
    pub image: PathBuf,
    /// How that is connected.
    pub bus: DiskBus,
    /// What boots it.
    pub firmware: Firmware,
    /// Its CPUs.
    pub cpus: Topology,
    /// Bochs' CPU model.
    pub model: String,
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Instructions a second of machine time (Bochs only): decides how many instructions a device's delay
    /// lasts.
    ///
    /// All delays of a PC (BIOS, disk, UART) are in machine time. At 100 million a character on the UART
    /// lasts 8,680 ticks and the BIOS 300 million; at 4 million it is 347 and 16 million, and yet a timer
    /// tick of 1 kHz leaves 4,000 instructions between two interrupts. Down to 1 million the BIOS boots.
    pub ips: u32,
    /// Whether the CPUs have split-lock detection (Bochs only).
    pub sld: bool,
    /// What is odd about that (Bochs only).
    pub quirk: Option<Quirk>,
    /// What MSR 0x33 belongs to (Bochs only).
    pub scope: SldScope,
    /// What the firmware leaves in MSRs (Bochs only).
    pub left_over: Vec<MsrWrite>,
    /// What befalls it (Bochs only).
    pub mishap: Option<Mishap>,
    /// Whether a profile of the hypervisor is recorded (Bochs only).
    pub profile: bool,
    /// What is sent to its first serial port.
    pub input: Input,
    /// More arguments for QEMU, which runs in the machine's directory.
    pub qemu_arguments: Vec<String>,
    /// A machine that says nothing for so long is stopped. One that goes on talking is stopped after
    /// [`LIMIT`] times as long.
    pub timeout: Duration,
}

/// How many times `timeout` a machine may run in total.
pub const LIMIT: u32 = 20;

impl Default for MachineConfig {
    /// One Arrow Lake CPU with split-lock detection in Bochs, and no image yet.
    fn default() -> Self {
        Self {
            emulator: Emulator::Bochs,
            image: PathBuf::new(),
            bus: DiskBus::Ide,
            firmware: Firmware::Bios,
            cpus: 1.into(),
            model: "arrow_lake".to_owned(),
            memory_mib: 256,
            ips: 4_000_000,
            sld: true,
            quirk: None,
            left_over: Vec::new(),
            mishap: None,
            scope: SldScope::Core,
            profile: false,
            input: Input::None,
            qemu_arguments: Vec::new(),
            timeout: Duration::from_secs(60),
        }
    }
}

/// What a run left.
#[derive(Clone, Debug)]
pub struct RunOutcome {
    /// The hypervisor's events, as [`events::in_order`] puts them.
    pub events: Vec<Event>,
    /// Every split lock that happened or faulted, in order (Bochs only).
    pub truth: Vec<Truth>,
    /// What was written to the first serial port.
    pub serial: String,
    /// How the machine ended.
    pub exit: Exit,
}

/// How a machine ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It powered itself off.
    PoweredOff,
    /// It said its last words, stayed on, and was ended.
    Stayed,
    /// A CPU shut itself down: a triple fault outside guests.
    CpuShutdown,
    /// The loader could not start the hypervisor, said why, and stopped.
    LoaderStopped,
    /// Whoever sat at its serial port left.
    Left,
    /// It was stopped because nothing happened for so long, or it went on for too long.
    TimedOut {
        /// Seconds it had run.
        seconds: u64,
    },
    /// The emulator ended in some other way.
    Died {
        /// Its exit status.
        status: String,
        /// What it said.
        output: String,
    },
}

impl Display for Exit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::PoweredOff => write!(f, "the machine powered itself off"),
            Self::Stayed => write!(f, "the machine stays on, as configured"),
            Self::CpuShutdown => write!(f, "a CPU shut down: triple fault in the hypervisor"),
            Self::LoaderStopped => write!(f, "the loader could not start the hypervisor"),
            Self::Left => write!(f, "the machine was stopped from the terminal"),
            Self::TimedOut { seconds } => {
                write!(f, "no progress: the machine was stopped after {seconds} s")
            }
            Self::Died { status, output } => write!(f, "the emulator ended: {status}\n{output}"),
        }
    }
}

/// What a run left, as it was written.
#[derive(Clone, Debug)]
pub struct Recording {
    /// The first serial port.
    pub serial: String,
    /// The second serial port.
    pub events: String,
    /// The truth file; empty on QEMU.
    pub truth: String,
    /// The profile, if it was asked for and the machine came to an end of its own.
    pub profile: String,
    /// How the machine ended.
    pub exit: Exit,
}

impl Recording {
    /// Reads the events and the truth.
    ///
    /// # Errors
    /// If a line is not what it should be.
    pub fn parse(self) -> Result<RunOutcome> {
        Ok(RunOutcome {
            events: events::in_order(
                events::parse_lines(&self.events).context("second serial port")?,
            ),
            truth: events::parse_lines(&self.truth).context("ground truth")?,
            serial: self.serial,
            exit: self.exit,
        })
    }
}

/// Runs the machine to its end. `on_serial` gets what it writes to its first serial port as it comes.
///
/// # Errors
/// If the machine cannot be made or started. However it ends by itself is an outcome, not an error.
pub fn record(config: &MachineConfig, on_serial: &mut dyn FnMut(&[u8])) -> Result<Recording> {
    config.check()?;
    let directory = Directory::new()?;
    let disk = directory.file(DISK);
    fs::copy(&config.image, disk)
        .with_context(|| format!("cannot copy {}", config.image.display()))?;
    let port = Port::of(&config.input)?;
    let number = port.as_ref().map(Port::number);
    let mut command = match config.emulator {
        Emulator::Bochs => bochs_command(config, &directory, number)?,
        Emulator::Qemu(accelerator) => {
            let mut command = qemu_command(config, accelerator, &directory, number)?;
            command.arg("-no-reboot");
            command
        }
    };
    command.current_dir(directory.path());
    let link = port.map(|port| Link::new(port, directory.file(SERIAL), &config.input));
    let exit = match watch(command, config, &directory, link, on_serial)? {
        Watched::Stopped(exit) => exit,
        Watched::Ended(status) => exit_of(config.emulator, status, directory.text(OUTPUT)?),
    };
    if config.emulator == Emulator::Bochs && !matches!(exit, Exit::Died { .. }) {
        bochs::check_msrs(config, &directory.text(bochs::file::LOG)?)?;
    }
    Ok(Recording {
        serial: directory.serial(config.firmware)?,
        events: directory.events(config.firmware)?,
        truth: directory.text(TRUTH)?,
        profile: directory.text(PROFILE)?,
        exit,
    })
}

/// Names of the files in the machine's directory.
pub(crate) const DISK: &str = "disk.img";
pub(crate) const SERIAL: &str = "serial.txt";
pub(crate) const EVENTS: &str = "events.jsonl";
const TRUTH: &str = "truth.jsonl";
const PROFILE: &str = "profile.jsonl";
pub(crate) const OUTPUT: &str = "output.txt";

impl MachineConfig {
    pub(crate) fn check(&self) -> Result<()> {
        self.cpus.check()?;
        if self.emulator == Emulator::Bochs
            && (self.bus != DiskBus::Ide || !self.qemu_arguments.is_empty())
        {
            bail!("only QEMU can make machines with a USB stick or with other devices");
        }
        if self.emulator != Emulator::Bochs && (!self.sld || self.quirk.is_some()) {
            bail!("only Bochs can make machines with and without split-lock detection");
        }
        if !self.sld && self.quirk.is_some() {
            bail!("split-lock detection that is not there cannot be odd");
        }
        let unusual = !self.left_over.is_empty() || self.mishap.is_some();
        if self.emulator != Emulator::Bochs && unusual {
            bail!("only Bochs can make machines whose firmware or hardware is odd");
        }
        Ok(())
    }
}

fn bochs_command(
    config: &MachineConfig,
    directory: &Directory,
    port: Option<u16>,
) -> Result<Command> {
    let shim = shim::build()?;
    let bochs = Bochs::ensure()?;
    bochs.configure(config, &directory.0, DISK, [SERIAL, EVENTS], port)?;
    let mut command = bochs.command(Some(&shim));
    command.args(["-q", "-f", bochs::file::CONFIG]).env("SLD_SHIM_TRUTH", TRUTH);
    match config.scope {
        SldScope::Thread => command.env("SLD_SHIM_SCOPE", "thread"),
        SldScope::Core => command
            .env("SLD_SHIM_SCOPE", "core")
            .env("SLD_SHIM_THREADS_PER_CORE", config.cpus.threads.to_string()),
    };
    if config.profile {
        command.env("SLD_SHIM_PROFILE", PROFILE);
    }
    let words = |writes: &[MsrWrite]| {
        let word = |MsrWrite { cpu, number, value }: &MsrWrite| {
            let cpu = cpu.map(|cpu| format!("{cpu:x}:")).unwrap_or_default();
            format!(",{cpu}{number:x}={value:x}")
        };
        writes.iter().map(word).collect::<String>()
    };
    match &config.mishap {
        None => {}
        Some(Mishap::Nmi) => {
            command.env("SLD_SHIM_MISHAP", "nmi");
        }
        Some(Mishap::MachineCheck(writes)) => {
            command.env("SLD_SHIM_MISHAP", format!("mc{}", words(writes)));
        }
    }
    if !config.left_over.is_empty() {
        command.env("SLD_SHIM_MSRS", &words(&config.left_over)[1..]);
    }
    Ok(command)
}

/// The command that runs the machine in QEMU. What it is told of monitors and resets is the caller's.
pub(crate) fn qemu_command(
    config: &MachineConfig,
    accelerator: Accelerator,
    directory: &Directory,
    port: Option<u16>,
) -> Result<Command> {
    let qemu = Qemu::ensure()?;
    let uefi = qemu.install_firmware(config, directory.path())?;
    Ok(qemu.machine(config, accelerator, uefi.as_ref(), DISK, [SERIAL, EVENTS], port))
}

fn exit_of(emulator: Emulator, status: ExitStatus, output: String) -> Exit {
    let powered_off = match emulator {
        Emulator::Bochs => bochs::powered_off(&output),
        Emulator::Qemu(_) => status.success(),
    };
    if powered_off { Exit::PoweredOff } else { Exit::Died { status: status.to_string(), output } }
}

/// A directory for one machine, removed when dropped.
pub(crate) struct Directory(PathBuf);

impl Directory {
    pub(crate) fn new() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let path = crate::target_directory().join(format!("machines/{}-{number}", process::id()));
        if path.exists() {
            // Of a process that was killed and had the same number.
            fs::remove_dir_all(&path)?;
        }
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(Self(path))
    }

    pub(crate) fn path(&self) -> &Path {
        &self.0
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// What was written to the first serial port.
    pub(crate) fn serial(&self, firmware: Firmware) -> Result<String> {
        let text = self.text(SERIAL)?;
        Ok(match firmware {
            Firmware::Bios => text,
            Firmware::Uefi => {
                String::from_utf8_lossy(&Plain::default().take(text.as_bytes())).into_owned()
            }
        })
    }

    /// The events on the second serial port.
    pub(crate) fn events(&self, firmware: Firmware) -> Result<String> {
        let text = self.text(EVENTS)?;
        Ok(match firmware {
            Firmware::Bios => text,
            // Such firmware writes to all serial ports what it writes to its screen.
            Firmware::Uefi => text[text.find(FIRST_EVENT).unwrap_or(text.len())..].to_owned(),
        })
    }

    /// A file's text, empty if the file was never made.
    pub(crate) fn text(&self, name: &str) -> Result<String> {
        match fs::read(self.file(name)) {
            Ok(bytes) => Ok(String::from_utf8_lossy(&bytes).into_owned()),
            Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            Err(why) => Err(why).with_context(|| format!("cannot read {name}")),
        }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // A leftover in the target directory does no harm.
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// How the stream of events begins.
const FIRST_EVENT: &str = "{\"seq\":0,";

/// A running emulator, killed when dropped.
pub(crate) struct Running(pub(crate) Child);

impl Drop for Running {
    fn drop(&mut self) {
        // Fails if it has ended already, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Running {
    /// Starts it. If this process is killed, so is the emulator.
    pub(crate) fn start(mut command: Command) -> Result<Self> {
        die_with_parent(&mut command);
        let shown = console::render(&command);
        console::verbose(&format!("$ {shown}"));
        command.spawn().map(Self).with_context(|| format!("cannot run {shown}"))
    }
}

/// The loader's last words, a line of their own, after which it halts for ever.
const LOADER_STOPPED: &[u8] = b"boot: stopped";

/// Takes a whole line from the start of what was read.
fn take_line(read: &mut Vec<u8>) -> Option<Vec<u8>> {
    let end = read.iter().position(|byte| *byte == b'\n')?;
    Some(read.drain(..=end).collect())
}

/// Whether a line of the second serial port is an event after which the hypervisor does nothing more.
fn is_last_event(line: &[u8]) -> bool {
    let event = serde_json::from_slice::<Event>(line).map(|event| event.body);
    matches!(event, Ok(Body::Shutdown { .. } | Body::Refused { .. } | Body::Panic { .. }))
}

enum Watched {
    Ended(ExitStatus),
    Stopped(Exit),
}

/// Starts the emulator and watches its files until it ends or stops making progress.
fn watch(
    mut command: Command,
    config: &MachineConfig,
    directory: &Directory,
    mut link: Option<Link>,
    on_serial: &mut dyn FnMut(&[u8]),
) -> Result<Watched> {
    const INTERVAL: Duration = Duration::from_millis(10);
    /// For the characters that the UART still holds when a CPU shuts down.
    const DRAIN: Duration = Duration::from_millis(500);

    /// For what a machine does between its last event and its end.
    const STAYS: Duration = Duration::from_secs(2);

    let output = File::create(directory.file(OUTPUT))?;
    command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
    let mut running = Running::start(command)?;

    let started = Instant::now();
    let mut last_progress = started;
    let mut serial = Tail::new(directory.file(SERIAL));
    let mut events = Tail::new(directory.file(EVENTS));
    let mut truth = Tail::new(directory.file(TRUTH));
    let mut log = Tail::new(directory.file(bochs::file::LOG));
    let mut terminal =
        (config.emulator == Emulator::Bochs).then(|| Terminal::new(directory.file(OUTPUT)));
    let mut logged = String::new();
    let mut shut_down = false;
    let mut said_last = false;
    let mut plain = (config.firmware == Firmware::Uefi).then(Plain::default);
    let [mut lines, mut event_lines] = [const { Vec::new() }; 2];
    loop {
        // Asked before the files are read, so that nothing written before the end is missed.
        let ended = running.0.try_wait()?;
        if let Some(terminal) = &mut terminal {
            terminal.drain();
        }
        if let Some(link) = &mut link
            && !link.exchange()?
        {
            return Ok(Watched::Stopped(Exit::Left));
        }
        let mut written = serial.read_new()?;
        let mut progress = !written.is_empty();
        if let Some(plain) = &mut plain {
            written = plain.take(&written);
        }
        on_serial(&written);
        lines.extend(written);
        while let Some(line) = take_line(&mut lines) {
            if line.trim_ascii() == LOADER_STOPPED {
                return Ok(Watched::Stopped(Exit::LoaderStopped));
            }
        }
        let new_events = events.read_new()?;
        progress |= !new_events.is_empty();
        event_lines.extend(new_events);
        while let Some(line) = take_line(&mut event_lines) {
            said_last |= is_last_event(&line);
        }
        progress |= !truth.read_new()?.is_empty();
        if let Some(status) = ended {
            return Ok(Watched::Ended(status));
        }
        logged.push_str(&String::from_utf8_lossy(&log.read_new()?));
        shut_down |= bochs::cpu_shut_down(&logged);
        // Whole lines are judged; a line may come in two pieces.
        logged.drain(..logged.rfind('\n').map_or(0, |end| end + 1));
        let now = Instant::now();
        if progress {
            last_progress = now;
        }
        if shut_down && now - last_progress > DRAIN {
            return Ok(Watched::Stopped(Exit::CpuShutdown));
        }
        if said_last && now - last_progress > STAYS {
            return Ok(Watched::Stopped(Exit::Stayed));
        }
        // Who sits there may think for as long as he likes.
        let is_patient = link.as_ref().is_some_and(Link::is_attended);
        let is_late =
            now - last_progress > config.timeout || now - started > config.timeout * LIMIT;
        if is_late && !is_patient {
            let seconds = (now - started).as_secs();
            return Ok(Watched::Stopped(Exit::TimedOut { seconds }));
        }
        thread::sleep(INTERVAL);
    }
}

/// Lets the kernel kill the emulator if this process is killed and cannot do it.
fn die_with_parent(command: &mut Command) {
    // SAFETY: between fork and exec only an async-signal-safe system call is made.
    unsafe {
        command.pre_exec(|| {
            if libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL) == 0 {
                Ok(())
            } else {
                Err(io::Error::last_os_error())
            }
        });
    }
}

/// Reads a file while it grows.
pub(crate) struct Tail {
    path: PathBuf,
    file: Option<File>,
}

impl Tail {
    pub(crate) fn new(path: PathBuf) -> Self {
        Self { path, file: None }
    }

    /// What was written since the last time; nothing while the file does not exist.
    pub(crate) fn read_new(&mut self) -> Result<Vec<u8>> {
        if self.file.is_none() {
            match File::open(&self.path) {
                Ok(file) => self.file = Some(file),
                Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
                Err(why) => {
                    return Err(why)
                        .with_context(|| format!("cannot read {}", self.path.display()));
                }
            }
        }
        let mut new = Vec::new();
        if let Some(file) = &mut self.file {
            file.read_to_end(&mut new)?;
        }
        Ok(new)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn watch_shell(script: &str, timeout: Duration) -> (Watched, String) {
        let directory = Directory::new().unwrap();
        let mut command = Command::new("sh");
        command.args(["-c", script]).current_dir(&directory.0);
        let config = MachineConfig { timeout, ..MachineConfig::default() };
        let mut seen = Vec::new();
        let watched =
            watch(command, &config, &directory, None, &mut |bytes| seen.extend_from_slice(bytes))
                .unwrap();
        (watched, String::from_utf8(seen).unwrap())
    }

    #[test]
    fn output_comes_through_to_the_last_byte() {
        let script = format!("printf one > {SERIAL}; sleep 0.1; printf two >> {SERIAL}; exit 3");
        let (watched, seen) = watch_shell(&script, Duration::from_secs(60));
        let Watched::Ended(status) = watched else { panic!("stopped") };
        assert_eq!((status.code(), seen.as_str()), (Some(3), "onetwo"));
    }

    #[test]
    fn silence_ends_a_run_and_progress_on_any_file_prolongs_it() {
        let script =
            format!("for n in 1 2 3 4 5; do sleep 0.6; echo x >> {EVENTS}; done; exec sleep 60");
        let started = Instant::now();
        let (watched, _) = watch_shell(&script, Duration::from_secs(2));
        assert!(matches!(watched, Watched::Stopped(Exit::TimedOut { .. })));
        let took = started.elapsed();
        assert!(took > Duration::from_secs(4) && took < Duration::from_secs(50), "{took:?}");
    }

    #[test]
    fn endless_talk_ends_a_run_too() {
        let script = format!("while :; do echo x >> {SERIAL}; sleep 0.01; done");
        let (watched, _) = watch_shell(&script, Duration::from_millis(100));
        assert!(matches!(watched, Watched::Stopped(Exit::TimedOut { .. })));
    }

    const LAST_EVENT: &str = r#"{"seq":0,"tsc":1,"cpu":0,"event":"shutdown","counters":{}}"#;

    #[test]
    fn a_machine_that_stays_on_after_its_last_event_is_ended() {
        let script = format!("echo '{LAST_EVENT}' > {EVENTS}; exec sleep 60");
        let (watched, _) = watch_shell(&script, Duration::from_secs(60));
        assert!(matches!(watched, Watched::Stopped(Exit::Stayed)));
    }

    #[test]
    fn a_machine_may_take_its_time_after_its_last_event() {
        let script = format!(
            "echo '{LAST_EVENT}' > {EVENTS}; sleep 1.2; echo more > {SERIAL}; sleep 1.2; exit 3"
        );
        let (watched, seen) = watch_shell(&script, Duration::from_secs(60));
        let Watched::Ended(status) = watched else { panic!("stopped") };
        assert_eq!((status.code(), seen.as_str()), (Some(3), "more\n"));
    }

    #[test]
    fn only_some_events_are_the_last() {
        for (event, last) in [
            (r#""event":"refused","why":"no VT-x""#, true),
            (r#""event":"panic","message":"oh""#, true),
            (r#""event":"real-bit","on":true,"why":"shutdown""#, false),
            (r#""event":"violation","what":"panic""#, false),
        ] {
            let line = format!("{{\"seq\":1,\"tsc\":1,\"cpu\":0,{event}}}\n");
            assert_eq!(is_last_event(line.as_bytes()), last, "{event}");
        }
        assert!(is_last_event(LAST_EVENT.as_bytes()));
        assert!(!is_last_event(&LAST_EVENT.as_bytes()[..40]));
    }

    #[test]
    fn a_loader_that_gives_up_ends_a_run_and_a_guest_that_quotes_it_does_not() {
        let script = format!("printf '[vm] boot: stopped\\r\\n' > {SERIAL}; sleep 0.3; exit 3");
        let (watched, _) = watch_shell(&script, Duration::from_secs(60));
        assert!(matches!(watched, Watched::Ended(_)));
        let script = format!(
            "printf 'boot: no kernel\\r\\nboot: stop' > {SERIAL}; sleep 0.1; \
             printf 'ped\\r\\n' >> {SERIAL}; exec sleep 60"
        );
        let (watched, _) = watch_shell(&script, Duration::from_secs(60));
        assert!(matches!(watched, Watched::Stopped(Exit::LoaderStopped)));
    }

    #[test]
    fn what_firmware_writes_is_not_part_of_the_events() {
        let directory = Directory::new().unwrap();
        fs::write(directory.file(EVENTS), format!("\x1b[2JBdsDxe: starting\r\n{LAST_EVENT}\n"))
            .unwrap();
        fs::write(directory.file(SERIAL), "\x1b[2J\x1b[001;001HBdsDxe: starting\r\n").unwrap();
        assert_eq!(directory.events(Firmware::Uefi).unwrap(), format!("{LAST_EVENT}\n"));
        assert_eq!(directory.serial(Firmware::Uefi).unwrap(), "BdsDxe: starting\r\n");
        fs::write(directory.file(EVENTS), "\x1b[2JBdsDxe: starting\r\n").unwrap();
        assert_eq!(directory.events(Firmware::Uefi).unwrap(), "");
    }

    #[test]
    fn a_triple_fault_ends_a_run_at_once() {
        let log = bochs::file::LOG;
        let script = format!("echo '3rd (14) exception with no resolution' > {log}; exec sleep 60");
        let (watched, _) = watch_shell(&script, Duration::from_secs(60));
        assert!(matches!(watched, Watched::Stopped(Exit::CpuShutdown)));
    }

    #[test]
    fn impossible_machines_are_refused() {
        let config = MachineConfig { cpus: 0.into(), ..MachineConfig::default() };
        assert!(config.check().unwrap_err().to_string().contains("at least one CPU"));
        let quirk = Some(Quirk::StuckOn);
        let absent = MachineConfig { sld: false, quirk, ..MachineConfig::default() };
        assert!(absent.check().is_err());
        let emulator = Emulator::Qemu(Accelerator::Tcg);
        let qemu = MachineConfig { emulator, quirk, ..MachineConfig::default() };
        assert!(qemu.check().is_err());
        let stick = MachineConfig { bus: DiskBus::Usb, ..MachineConfig::default() };
        assert!(stick.check().is_err());
    }
}
