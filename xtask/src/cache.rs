//! What is fetched into the user's cache, from Debian packages: a private root with the emulators, and a
//! Linux with KVM for the nested tests. Fetched once, shared by all checkouts and never installed into
//! the host.
//!
//! `mmdebstrap` resolves and downloads the packages without installing any; what it writes is unpacked
//! here, by this user, into a directory of another name, checked, and only then renamed. A directory
//! with the final name is therefore always complete.

use std::env;
use std::fs::{self, File, TryLockError};
use std::io::{BufRead, BufReader, Read};
use std::path::{Component, Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::console::{self, Step};

/// What is fetched together into one directory.
struct Collection {
    /// Name of the directory. To be changed with what stands in it.
    name: &'static str,
    /// In words, with the size of the download.
    about: &'static str,
    /// The Debian release.
    suite: &'static str,
    /// What is fetched; the rest is what these depend on.
    packages: &'static [&'static str],
    /// Where a file of the packages goes in the directory, or that it is not kept.
    place: fn(&Path) -> Option<PathBuf>,
    /// Without these the directory is of no use.
    needed: &'static [&'static str],
}

/// From the release that has Bochs 3.1. `ncurses-base` describes the terminal for which Bochs draws its
/// screen.
const EMULATORS: Collection = Collection {
    name: "emulators-2",
    about: "Bochs and QEMU into the cache (400 MB, once)",
    suite: "forky",
    packages: &[
        "bochs",
        "bochs-term",
        "bochsbios",
        "vgabios",
        "ncurses-base",
        "qemu-system-x86",
        "seabios",
        "ovmf",
    ],
    place: |path| Some(path.to_owned()),
    needed: &[
        "usr/lib/x86_64-linux-gnu/ld-linux-x86-64.so.2",
        "usr/bin/bochs-bin",
        "usr/lib/x86_64-linux-gnu/bochs/plugins/libbx_term_gui.so",
        "usr/share/bochs/BIOS-bochs-latest",
        "usr/share/bochs/VGABIOS-lgpl-latest",
        "usr/share/terminfo/v/vt100",
        "usr/bin/qemu-system-x86_64",
        "usr/share/seabios/bios-256k.bin",
        "usr/share/OVMF/OVMF_CODE_4M.fd",
        "usr/share/OVMF/OVMF_VARS_4M.fd",
    ],
};

/// The release whose Linux is 6.1: that has been seen to run in Bochs. Of the packages only the kernel
/// and the modules of KVM are kept, without their directories, whose names have a version in them.
const LINUX: Collection = Collection {
    name: "linux-1",
    about: "Linux with KVM into the cache (100 MB, once)",
    suite: "bookworm",
    packages: &["linux-image-amd64"],
    place: |path| {
        let name = path.file_name()?.to_str()?;
        if name.starts_with("vmlinuz-") {
            return Some("vmlinuz".into());
        }
        LINUX_MODULES.contains(&name).then(|| name.into())
    },
    needed: &["vmlinuz", "irqbypass.ko", "kvm.ko", "kvm-intel.ko"],
};
/// The modules of KVM, in the order in which they need each other.
pub const LINUX_MODULES: [&str; 3] = ["irqbypass.ko", "kvm.ko", "kvm-intel.ko"];

/// Directory of the shared libraries, and of the loader that finds them.
const LIBRARIES: &str = "usr/lib/x86_64-linux-gnu";
/// A complete root.
#[derive(Clone, Debug)]
pub struct Root(PathBuf);

impl Root {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Directory of its shared libraries.
    pub fn libraries(&self) -> PathBuf {
        self.0.join(LIBRARIES)
    }

    /// A command that runs `program` (a path in the root) with the root's own loader and libraries, and
    /// with `preload` loaded before it. No chroot, no privileges.
    pub fn command(&self, program: &str, preload: Option<&Path>) -> Command {
        let libraries = self.libraries();
        let mut command = Command::new(libraries.join("ld-linux-x86-64.so.2"));
        command.arg("--library-path").arg(libraries);
        if let Some(library) = preload {
            command.arg("--preload").arg(library);
        }
        command.arg(self.0.join(program));
        command
    }
}

impl Collection {
    /// The directory, if it is there already.
    fn existing(&self) -> Option<PathBuf> {
        let path = directory().ok()?.join(self.name);
        path.is_dir().then_some(path)
    }

    /// The directory; fetches it if it is not there yet.
    fn ensure(&self) -> Result<PathBuf> {
        if let Some(path) = self.existing() {
            return Ok(path);
        }
        let directory = directory()?;
        fs::create_dir_all(&directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        let _lock = lock(&directory)?;
        // Another process may have fetched it while this one waited.
        if let Some(path) = self.existing() {
            return Ok(path);
        }
        self.fetch(&directory).with_context(|| format!("cannot fetch {}", self.about))
    }

    fn check(&self, path: &Path) -> Result<()> {
        let missing: Vec<_> = self.needed.iter().filter(|file| !path.join(file).exists()).collect();
        ensure!(missing.is_empty(), "the packages of {} lack {missing:?}", self.suite);
        Ok(())
    }
}

/// The directory for everything that this project caches: `unsplit` in `$XDG_CACHE_HOME` or `~/.cache`.
///
/// # Errors
/// If neither variable leads anywhere.
pub fn directory() -> Result<PathBuf> {
    // The XDG base directory specification: relative paths are to be ignored.
    let absolute = |name| env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    absolute("XDG_CACHE_HOME")
        .or_else(|| absolute("HOME").map(|home| home.join(".cache")))
        .map(|cache| cache.join("unsplit"))
        .ok_or_else(|| anyhow!("neither XDG_CACHE_HOME nor HOME names a directory for the cache"))
}

/// The root, if it is there already.
pub fn existing() -> Option<Root> {
    EMULATORS.existing().map(Root)
}

/// The root; fetches it if it is not there yet.
///
/// # Errors
/// If it cannot be fetched; the message says what to do.
pub fn ensure() -> Result<Root> {
    EMULATORS.ensure().map(Root)
}

/// Directory of a Linux, if it is there already.
pub fn existing_linux() -> Option<PathBuf> {
    LINUX.existing()
}

/// Directory of a Linux: `vmlinuz` and [`LINUX_MODULES`]. Fetches it if it is not there yet.
///
/// # Errors
/// If it cannot be fetched; the message says what to do.
pub fn linux() -> Result<PathBuf> {
    LINUX.ensure()
}

/// One at a time; released when the file is closed, be it by a crash.
fn lock(directory: &Path) -> Result<File> {
    let path = directory.join("lock");
    let file = File::create(&path).with_context(|| format!("cannot write {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let step = Step::start("waiting for another process that fetches into the cache");
            file.lock()?;
            step.done();
        }
        Err(TryLockError::Error(why)) => {
            return Err(why).with_context(|| format!("cannot lock {}", path.display()));
        }
    }
    Ok(file)
}

/// Removed when dropped, unless it was renamed before.
struct Unfinished(PathBuf);

impl Drop for Unfinished {
    fn drop(&mut self) {
        // Nothing to remove after the renaming; what cannot be removed is removed by the next attempt.
        let _ = fs::remove_dir_all(&self.0);
    }
}

impl Collection {
    /// Fetches and unpacks. The caller holds the lock.
    fn fetch(&self, directory: &Path) -> Result<PathBuf> {
        ensure_mmdebstrap()?;
        let unfinished = Unfinished(directory.join(format!("{}.unfinished", self.name)));
        if unfinished.0.exists() {
            fs::remove_dir_all(&unfinished.0).context("cannot remove an interrupted download")?;
        }
        fs::create_dir(&unfinished.0)?;

        let mut command = self.mmdebstrap();
        console::verbose(&format!("$ {}", console::render(&command)));
        let step = Step::start(&format!("fetching {}", self.about));
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
        let (archive, messages) =
            child.stdout.take().zip(child.stderr.take()).context("no pipes")?;
        let (unpacked, log) = thread::scope(|scope| {
            let log = scope.spawn(|| follow(messages, &step));
            (unpack(archive, &unfinished.0, self.place), log.join().unwrap_or_default())
        });
        let status = child.wait()?;
        if !status.success() {
            bail!("{}: {status}\n{log}{}", console::render(&command), network_hint(&log));
        }
        unpacked.context("cannot unpack the packages")?;

        self.check(&unfinished.0)?;
        let finished = directory.join(self.name);
        fs::rename(&unfinished.0, &finished)?;
        step.done();
        Ok(finished)
    }

    /// Writes a tar archive of the unpacked packages to its standard output.
    fn mmdebstrap(&self) -> Command {
        let mut command = Command::new("mmdebstrap");
        command
            .args(["--variant=extract", "--format=tar", "--architectures=amd64"])
            .arg(format!("--include={}", self.packages.join(",")))
            .arg(r#"--aptopt=APT::Install-Recommends "false""#)
            .arg(r#"--aptopt=Acquire::Check-Valid-Until "false""#)
            .args([self.suite, "-"]);
        command
    }
}

/// Shows mmdebstrap's progress and returns all that it said.
fn follow(messages: impl Read, step: &Step) -> String {
    let mut log = String::new();
    for line in BufReader::new(messages).lines().map_while(Result::ok) {
        if let Some(text) = line.strip_prefix("I: ") {
            step.note(text);
        }
        log.push_str(&line);
        log.push('\n');
    }
    log
}

/// Unpacks files, directories and links to where `place` wants them; device nodes, which only root could
/// make, are not needed.
fn unpack(
    archive: impl Read,
    target: &Path,
    place: impl Fn(&Path) -> Option<PathBuf>,
) -> Result<()> {
    use tar::EntryType::{Directory, Link, Regular, Symlink};

    let mut archive = tar::Archive::new(archive);
    for entry in archive.entries()? {
        let mut entry = entry?;
        if !matches!(entry.header().entry_type(), Regular | Directory | Link | Symlink) {
            continue;
        }
        let path: PathBuf =
            entry.path()?.components().filter(|c| *c != Component::CurDir).collect();
        match place(&path) {
            None => {}
            Some(same) if same == path => {
                entry.unpack_in(target)?;
            }
            Some(other) => {
                entry.unpack(target.join(other))?;
            }
        }
    }
    Ok(())
}

fn network_hint(log: &str) -> &'static str {
    if ["resolve", "connect", "Failed to fetch"].iter().any(|word| log.contains(word)) {
        "\nThe packages come from the Debian mirror: is there a network, and a proxy in http_proxy?"
    } else {
        ""
    }
}

/// Whether a program is in the PATH.
pub fn in_path(program: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH")?;
    env::split_paths(&path).map(|directory| directory.join(program)).find(|file| file.is_file())
}

/// How to get mmdebstrap, for those whose system this program cannot or may not change.
pub const INSTALL_MMDEBSTRAP: &str = "install mmdebstrap and debian-archive-keyring with your \
     package manager (Debian, Ubuntu: apt-get install mmdebstrap debian-archive-keyring)";

/// Whether [`ensure`] can install mmdebstrap by itself.
pub fn may_install() -> bool {
    // SAFETY: no preconditions, cannot fail.
    let root = unsafe { libc::geteuid() } == 0;
    root && in_path("apt-get").is_some()
}

fn ensure_mmdebstrap() -> Result<()> {
    if in_path("mmdebstrap").is_some() {
        return Ok(());
    }
    ensure!(may_install(), "mmdebstrap is missing: {INSTALL_MMDEBSTRAP}");
    let step = Step::start("installing mmdebstrap");
    for arguments in [
        &["-q", "update"][..],
        &["-q", "install", "-y", "--no-install-recommends", "mmdebstrap", "debian-archive-keyring"],
    ] {
        step.note(&format!("apt-get {}", arguments.join(" ")));
        let mut command = Command::new("apt-get");
        command.args(arguments).env("DEBIAN_FRONTEND", "noninteractive");
        let output = console::capture(&mut command)?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            bail!("{}: {}\n{said}", console::render(&command), output.status);
        }
    }
    step.done();
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_a_user_can_make_is_unpacked() {
        let mut archive = tar::Builder::new(Vec::new());
        let mut add = |kind, name: &str, link: Option<&str>, data: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_entry_type(kind);
            header.set_mode(0o755);
            header.set_size(data.len() as u64);
            match link {
                Some(target) => archive.append_link(&mut header, name, target).unwrap(),
                None => archive.append_data(&mut header, name, data).unwrap(),
            }
        };
        add(tar::EntryType::Directory, "usr/", None, b"");
        add(tar::EntryType::Regular, "usr/file", None, b"text");
        add(tar::EntryType::Symlink, "usr/link", Some("file"), b"");
        add(tar::EntryType::Char, "null", None, b"");
        let archive = archive.into_inner().unwrap();

        let target = env::temp_dir().join(format!("unsplit-unpack-{}", std::process::id()));
        fs::create_dir(&target).unwrap();
        let target = Unfinished(target);
        unpack(archive.as_slice(), &target.0, EMULATORS.place).unwrap();
        assert_eq!(fs::read(target.0.join("usr/link")).unwrap(), b"text");
        assert!(!target.0.join("null").exists());
        // A download that breaks off is an error, not a smaller root.
        assert!(unpack(&archive[..700], &target.0, EMULATORS.place).is_err());
        // Only what is wanted, where it is wanted.
        let place = |path: &Path| (path == Path::new("usr/file")).then(|| "other".into());
        unpack(archive.as_slice(), &target.0.join("usr"), place).unwrap();
        assert_eq!(fs::read(target.0.join("usr/other")).unwrap(), b"text");
        assert!(!target.0.join("usr/usr").exists());
    }

    #[test]
    fn an_incomplete_root_is_not_accepted() {
        let refused = EMULATORS.check(Path::new("/nonexistent")).unwrap_err().to_string();
        assert!(refused.contains("bochs-bin"), "{refused}");
    }

    #[test]
    fn of_linux_only_the_kernel_and_kvm_are_kept() {
        let place = |path: &str| (LINUX.place)(Path::new(path));
        assert_eq!(place("boot/vmlinuz-6.1.0-1-amd64"), Some("vmlinuz".into()));
        assert_eq!(place("lib/modules/6.1.0-1-amd64/kernel/x/kvm.ko"), Some("kvm.ko".into()));
        assert_eq!(place("lib/modules/6.1.0-1-amd64/kernel/x/kvm-amd.ko"), None);
        assert_eq!(place("boot/System.map-6.1.0-1-amd64"), None);
        assert!(LINUX_MODULES.iter().all(|module| LINUX.needed.contains(module)));
    }
}
