//! Linux in the reference machine: Debian's kernel with KVM, and programs that run under it.
//!
//! The machine is Bochs with the split-lock shim, as for the hypervisor; its Linux is the host (L0) of what
//! QEMU runs in it. The file system is in memory and has only what is needed, each file at the path that it
//! has here, so that a command which runs here runs there.

mod boot;
mod kernel;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cpio::newc;

use crate::bochs::{self, Bochs};
use crate::cache::{self, Root};
use crate::console::{self, Step};
use crate::events::{self, Truth};
use crate::machine::{Directory, LIMIT, Running, Tail};
use crate::{bare, shim};

/// What runs, and on which machine: one CPU with split-lock detection.
#[derive(Clone, Debug)]
pub struct Linux {
    /// Memory in MiB.
    pub memory_mib: u32,
    /// Instructions a second of machine time.
    pub ips: u32,
    /// More words for the kernel's command line.
    pub options: String,
    /// Parameters of the module `kvm-intel`.
    pub kvm: String,
    /// Files that are there, besides the kernel's modules.
    pub files: BTreeSet<PathBuf>,
    /// Files whose content is wanted, as it grows.
    pub outlets: [PathBuf; OUTLETS],
    /// The programs that run one after the other, each in its directory.
    pub programs: Vec<(PathBuf, Vec<String>)>,
    /// The machine is stopped when it says nothing for so long, or talks for [`LIMIT`] times as long.
    pub timeout: Duration,
}

/// What a run left.
#[derive(Clone, Debug)]
pub struct Left {
    /// What the kernel and the programs said.
    pub console: String,
    /// Of each program, how it ended.
    pub ends: Vec<End>,
    /// What was written to the outlets.
    pub outlets: [String; OUTLETS],
    /// Every split lock that happened or faulted, in order, of each program. One that comes within
    /// [`INTERVAL`] of an end may be counted to the wrong program, if any splits locks so soon.
    pub truth: Vec<Vec<Truth>>,
}

/// How a program ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// By itself, with this status.
    Exit(u8),
    /// By this signal.
    Signal(u8),
}

/// Bochs' CPU model: Linux 6.1 takes it for one with split-lock detection. It does not know the newer ones.
const MODEL: &str = "tigerlake";

/// Number of files whose content can be had.
pub const OUTLETS: usize = 2;
/// The serial ports that they go to, and the names that Bochs has for these.
const PORTS: [(&str, u16); OUTLETS] = [("com2", 0x2f8), ("com3", 0x3e8)];

/// What is not needed, or what Bochs does not do as Linux wants it: no ACPI and no PCI without a BIOS; incomplete
/// machine-check MSRs; extended state in a form that Linux does not like.
const OPTIONS: &str = "console=ttyS0 quiet nokaslr acpi=off pci=off mce=off clearcpuid=pku,xsavec,xsaves \
    tsc=reliable no_timer_check cryptomgr.notests panic=-1 random.trust_cpu=on";

/// MSRs that Linux expects and the CPU models lack, with their values: IA32_BIOS_SIGN_ID, IA32_MPERF, IA32_APERF,
/// IA32_MISC_ENABLE.
const MSRS: [(u32, u64); 4] = [(0x8b, 0), (0xe7, 0), (0xe8, 0), (0x1a0, 1)];

/// How often the machine's files are read.
const INTERVAL: Duration = Duration::from_millis(50);

/// What the kernel says when it cannot go on.
const PANIC: &str = "Kernel panic";

/// Names of the files in the machine's directory.
mod file {
    pub const ROM: &str = "rom.bin";
    pub const DISK: &str = "disk.img";
    pub const CONSOLE: &str = "console.txt";
    pub const OUTLETS: [&str; super::OUTLETS] = ["outlet-0.txt", "outlet-1.txt"];
    pub const TRUTH: &str = "truth.jsonl";
    pub const OUTPUT: &str = "output.txt";
}

impl Linux {
    /// Runs all programs.
    ///
    /// # Errors
    /// If the machine cannot be made, does not get on, or does not run all programs.
    pub fn run(&self, step: &Step) -> Result<Left> {
        let directory = Directory::new()?;
        self.prepare(&directory)?;
        let shim = shim::build()?;
        let mut command = Bochs::ensure()?.command(Some(&shim));
        command
            .args(["-q", "-f", bochs::file::CONFIG])
            .env("SLD_SHIM_TRUTH", file::TRUTH)
            .env("SLD_SHIM_SCOPE", "core")
            .env("SLD_SHIM_THREADS_PER_CORE", "1")
            .current_dir(directory.path());
        let watched = self.watch(command, &directory, step);
        let console = directory.text(file::CONSOLE)?;
        let truth = watched.with_context(|| {
            let output = directory.text(file::OUTPUT).unwrap_or_default();
            format!("Linux in Bochs said:\n{console}\n{output}")
        })?;
        let ends = ends(&console);
        if ends.len() < self.programs.len() {
            bail!("Linux in Bochs did not run all programs; it said:\n{console}");
        }
        let [first, second] = file::OUTLETS;
        Ok(Left {
            ends,
            outlets: [directory.text(first)?, directory.text(second)?],
            truth,
            console,
        })
    }

    /// Writes the machine's files.
    fn prepare(&self, directory: &Directory) -> Result<()> {
        let linux = cache::linux()?;
        let image = linux.join("vmlinuz");
        let header = read(&image)?;
        let vmlinux = kernel::vmlinux_beside(&image, &header)?;
        let options = format!("{OPTIONS} tsc_early_khz={} {}", self.ips / 1000, self.options);
        console::verbose(&format!("Linux' command line: {options}"));
        let files = self.initramfs(&linux)?;
        let disk = boot::disk(&header, &vmlinux, &files, &options, self.memory_mib)?;
        fs::write(directory.file(file::DISK), disk)?;
        fs::write(directory.file(file::ROM), boot::rom())?;
        fs::write(directory.file(bochs::file::MSRS), Self::msrs())?;
        fs::write(directory.file(bochs::file::CONFIG), self.bochsrc())?;
        Ok(())
    }

    fn msrs() -> String {
        let others = MSRS.into_iter().map(|(number, value)| (number, [value, 0, 0]));
        bochs::sld_msrs(None).into_iter().chain(others).map(bochs::msr_line).collect()
    }

    fn bochsrc(&self) -> String {
        let Self { memory_mib, ips, .. } = self;
        let outlets: String = (PORTS.iter().zip(file::OUTLETS))
            .map(|((port, _), file)| format!("{port}: enabled=1, mode=file, dev={file}\n"))
            .collect();
        format!(
            "\
cpu: model={MODEL}, count=1, ips={ips}, reset_on_triple_fault=0, ignore_bad_msrs=0, msrs=\"{msrs}\"
memory: guest={memory_mib}, host={memory_mib}
romimage: file={rom}
vgaromimage: file=$BXSHARE/VGABIOS-lgpl-latest
vga: extension=none, update_freq=1, realtime=0
ata0-master: type=disk, path={disk}, mode=flat
boot: disk
com1: enabled=1, mode=file, dev={console}
{outlets}clock: sync=none, time0=946684800
log: {log}
panic: action=fatal
display_library: term
speaker: enabled=0
sound: waveoutdrv=dummy, waveindrv=dummy, midioutdrv=dummy
",
            msrs = bochs::file::MSRS,
            rom = file::ROM,
            disk = file::DISK,
            console = file::CONSOLE,
            log = bochs::file::LOG,
        )
    }

    /// The file system: the init process with its script, the modules, the files.
    fn initramfs(&self, linux: &Path) -> Result<Vec<u8>> {
        let mut script = String::new();
        let mut archive = Archive::default();
        for directory in ["/dev", "/proc", "/sys", "/tmp"] {
            archive.directory(Path::new(directory))?;
        }
        archive.file(Path::new("/init"), &read(&bare::linux_init()?)?)?;
        for module in cache::LINUX_MODULES {
            let path = Path::new("/").join(module);
            archive.file(&path, &kernel::unsigned(read(&linux.join(module))?))?;
            let parameters = if module == "kvm-intel.ko" { &*self.kvm } else { "" };
            script += &format!("module\t{}\t{parameters}\n", path.display());
        }
        for ((_, port), path) in PORTS.iter().zip(&self.outlets) {
            script += &format!("outlet\t{port:x}\t{}\n", path.display());
        }
        for (directory, words) in &self.programs {
            archive.directory(directory)?;
            script += &format!("run\t{}\t{}\n", directory.display(), words.join("\t"));
        }
        for path in &self.files {
            archive.file(path, &read(path)?)?;
        }
        archive.file(Path::new("/script"), script.as_bytes())?;
        archive.finish()
    }

    /// Runs the machine to its end. Returns the split locks of each program.
    fn watch(
        &self,
        mut command: Command,
        directory: &Directory,
        step: &Step,
    ) -> Result<Vec<Vec<Truth>>> {
        let output = File::create(directory.file(file::OUTPUT))?;
        command.stdin(Stdio::null()).stdout(output.try_clone()?).stderr(output);
        let mut running = Running::start(command)?;
        let started = Instant::now();
        let mut last_progress = started;
        let [first, second] = file::OUTLETS;
        let tail = |name| Tail::new(directory.file(name));
        let mut watched = [file::CONSOLE, first, second].map(tail);
        let mut said = [const { String::new() }; 3];
        let mut truth = tail(file::TRUTH);
        let mut truths = vec![String::new(); self.programs.len() + 1];
        loop {
            let ended = running.0.try_wait()?;
            // Of the program that ran when the console was read last: it writes of its end before another
            // begins.
            let [console, ..] = &said;
            let number = ends(console).len().min(self.programs.len());
            let new = String::from_utf8_lossy(&truth.read_new()?).into_owned();
            if !new.is_empty() {
                last_progress = Instant::now();
            }
            // A line may come in two pieces, which belong together.
            let unfinished =
                truths.iter().rposition(|text| !text.is_empty() && !text.ends_with('\n'));
            truths[unfinished.unwrap_or(number)].push_str(&new);
            for (file, said) in watched.iter_mut().zip(&mut said) {
                let new = String::from_utf8_lossy(&file.read_new()?).into_owned();
                if new.is_empty() {
                    continue;
                }
                last_progress = Instant::now();
                said.push_str(&new);
                // Whole lines are shown.
                if new.contains('\n')
                    && let Some(line) = said.trim_end().lines().last()
                {
                    step.note(line);
                }
            }
            let [console, ..] = &said;
            // It would start again, and again.
            ensure!(!console.contains(PANIC), "Linux panicked");
            if ended.is_some() {
                let said = directory.text(file::OUTPUT)?;
                ensure!(bochs::powered_off(&said), "the machine ended by itself");
                let truths = truths.iter().map(|text| events::parse_lines(text));
                return truths.collect::<Result<_>>().context("ground truth");
            }
            let limit = self.timeout * LIMIT;
            if last_progress.elapsed() > self.timeout || started.elapsed() > limit {
                bail!(
                    "no progress: the machine was stopped after {} s",
                    started.elapsed().as_secs()
                );
            }
            thread::sleep(INTERVAL);
        }
    }
}

/// The files that a program of the root needs to run: itself, its libraries, and the loader.
///
/// # Errors
/// If the loader does not tell.
pub fn program_files(root: &Root, program: &str) -> Result<BTreeSet<PathBuf>> {
    let mut list = root.command(program, None);
    let arguments: Vec<_> = list.get_args().map(ToOwned::to_owned).collect();
    let loader = PathBuf::from(list.get_program());
    list = Command::new(&loader);
    list.arg("--list").args(arguments);
    let output = console::capture(&mut list)?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{}: {text}", console::render(&list));
    // `libz.so.1 => /usr/lib/libz.so.1 (0x…)`; what the kernel provides and the loader have no arrow.
    let libraries = text.lines().filter_map(|line| {
        let (_, rest) = line.split_once(" => ")?;
        Some(PathBuf::from(rest.rsplit_once(" (")?.0))
    });
    Ok(libraries.chain([loader, root.path().join(program)]).collect())
}

/// What init said of how the programs ended.
fn ends(console: &str) -> Vec<End> {
    let lines = console.lines().filter_map(|line| line.trim().strip_prefix("init: run "));
    let end = |line: &str| {
        let (how, number) = line.split_once(' ')?;
        let number = number.parse().ok()?;
        match how {
            "exit" => Some(End::Exit(number)),
            "signal" => Some(End::Signal(number)),
            _ => None,
        }
    };
    lines.filter_map(end).collect()
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// A file system as Linux unpacks it.
#[derive(Default)]
struct Archive {
    bytes: Vec<u8>,
    directories: BTreeSet<PathBuf>,
    number: u32,
}

impl Archive {
    /// Types of file system objects, and rights for all.
    const DIRECTORY: u32 = 0o040_755;
    const FILE: u32 = 0o100_755;

    /// Adds a directory and those it is in, if they are not there yet.
    fn directory(&mut self, path: &Path) -> Result<()> {
        let missing: Vec<_> = path
            .ancestors()
            .take_while(|path| path.parent().is_some())
            .map(Path::to_owned)
            .collect();
        for directory in missing.into_iter().rev() {
            if self.directories.insert(directory.clone()) {
                self.entry(&directory, Self::DIRECTORY, &[])?;
            }
        }
        Ok(())
    }

    /// Adds a file.
    fn file(&mut self, path: &Path, content: &[u8]) -> Result<()> {
        self.directory(path.parent().context("a file without a directory")?)?;
        self.entry(path, Self::FILE, content)
    }

    fn entry(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        let name = path.strip_prefix("/")?.to_str().context("a path that is not UTF-8")?;
        self.number += 1;
        let entry = newc::Builder::new(name).ino(self.number).mode(mode).nlink(1);
        let mut writer = entry.write(&mut self.bytes, u32::try_from(content.len())?);
        std::io::Write::write_all(&mut writer, content)?;
        writer.finish()?;
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        newc::trailer(&mut self.bytes)?;
        Ok(self.bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ends_are_read_from_among_other_lines() {
        let text = "[    0.1] x86\r\ninit: run exit 33\r\ninit: failed: run: error 2\r\ninit: run signal 7\r\n";
        assert_eq!(ends(text), [End::Exit(33), End::Signal(7)]);
        assert!(ends("init: run away 3").is_empty());
    }

    #[test]
    fn directories_come_before_what_is_in_them_and_once() {
        let mut archive = Archive::default();
        archive.file(Path::new("/a/b/one"), b"1").unwrap();
        archive.file(Path::new("/a/b/two"), b"22").unwrap();
        let bytes = archive.finish().unwrap();
        let mut names = Vec::new();
        let mut rest = &bytes[..];
        loop {
            let reader = newc::Reader::new(rest).unwrap();
            if reader.entry().is_trailer() {
                break;
            }
            names.push((reader.entry().name().to_owned(), reader.entry().mode()));
            rest = reader.finish().unwrap();
        }
        let expected = [
            ("a", Archive::DIRECTORY),
            ("a/b", Archive::DIRECTORY),
            ("a/b/one", Archive::FILE),
            ("a/b/two", Archive::FILE),
        ];
        assert_eq!(names, expected.map(|(name, mode)| (name.to_owned(), mode)));
    }
}
