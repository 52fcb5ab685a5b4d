//! `cargo xtask flash`: writes the stick's image to a USB stick, and only to that.
//!
//! Everything is checked before anything is erased: that the device is a whole disk, of a kind that
//! people pull out, in nobody's use, and large enough. What was written is read back.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufRead, IsTerminal, Read, Seek, SeekFrom, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

use crate::stick::StickArgs;
use crate::system::TemporaryDisk;

/// Arguments of `flash`.
#[derive(Args, Debug)]
pub struct FlashArgs {
    /// The stick, a whole disk such as /dev/sdb. All that is on it is erased.
    #[arg(value_name = "DEVICE")]
    device: PathBuf,
    /// Write this image instead of building one.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["sld", "guest", "expose_sld", "config", "size"])]
    image: Option<PathBuf>,
    #[command(flatten)]
    stick: StickArgs,
    /// Do not ask.
    #[arg(long)]
    yes: bool,
    /// Write also to a disk that is built in, or to a file.
    #[arg(long)]
    force: bool,
}

/// `cargo xtask flash`
///
/// # Errors
/// If the device must not or cannot be written, or what is read back is something else.
pub fn run(args: &FlashArgs) -> Result<()> {
    let target = Target::find(&args.device, Path::new("/"))?;
    target.check(args.force)?;
    let mut device = target.open()?;
    ensure!(
        args.yes || io::stdin().is_terminal(),
        "there is no terminal to ask whether {} may be erased: say --yes if it may",
        target.path.display()
    );

    let built;
    let image = match &args.image {
        Some(image) => image.as_path(),
        None => {
            built = TemporaryDisk::new();
            args.stick.write(built.path())?;
            built.path()
        }
    };
    let mut image =
        File::open(image).with_context(|| format!("cannot read {}", image.display()))?;
    let bytes = image.seek(SeekFrom::End(0))?;
    ensure!(bytes > 0, "the image is empty");
    let room = device.seek(SeekFrom::End(0))?;
    ensure!(
        bytes <= room,
        "the image has {}, {} only {}: make it smaller with --size",
        HumanBytes(bytes),
        target.path.display(),
        HumanBytes(room)
    );

    eprint!("{target}");
    if !args.yes {
        ask(&target.name, &mut io::stdin().lock())?;
    }
    flash(&mut image, &mut device, bytes, &mut File::settle, &mut Bar::default())?;
    adapt(&mut device)
        .and_then(|()| Ok(device.settle()?))
        .and_then(|()| {
            Ok(gpt::GptConfig::new().only_valid_headers(true).open_from_device(&mut device)?)
        })
        .context("the partition table cannot be written to the end of the device")?;
    if target.disk.is_some()
        && let Err(why) = device.control(BLKRRPART)
    {
        eprintln!(
            "warning: Linux still knows the old partitions ({why}): pull the stick out and put it in again"
        );
    }
    println!(
        "{} is ready: boot it, with VT-x on and Secure Boot off in the firmware's settings.\n\
         Edit hv.toml and guests/ on its volume UNSPLIT; README.txt there says more.",
        target.path.display()
    );
    Ok(())
}

/// Where an image is to be written.
#[derive(Debug)]
struct Target {
    path: PathBuf,
    /// What has to be typed.
    name: String,
    /// If it is a block device.
    disk: Option<Disk>,
}

/// A whole disk as Linux knows it.
#[derive(Debug, Default, PartialEq, Eq)]
struct Disk {
    model: String,
    bytes: u64,
    removable: bool,
    read_only: bool,
    partitions: Vec<Partition>,
    /// Who has it in use: a sentence each.
    users: Vec<String>,
}

#[derive(Debug, Default, PartialEq, Eq)]
struct Partition {
    name: String,
    bytes: u64,
    label: Option<String>,
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        let Some(disk) = &self.disk else {
            return writeln!(f, "{path} is a file and is overwritten.");
        };
        writeln!(f, "{path}: {}, {}. All of it is erased.", disk.model, HumanBytes(disk.bytes))?;
        for Partition { name, bytes, label } in &disk.partitions {
            let label = label.as_deref().unwrap_or("no label");
            writeln!(f, "  {name}: {}, {label}", HumanBytes(*bytes))?;
        }
        Ok(())
    }
}

impl Target {
    /// What is at `path`; `root` is where `sys`, `proc` and `dev` are.
    fn find(path: &Path, root: &Path) -> Result<Self> {
        let shown = path.display();
        let metadata = fs::metadata(path).with_context(|| {
            format!("there is no {shown}; lsblk shows the disks that there are")
        })?;
        let name = path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned();
        if !metadata.file_type().is_block_device() {
            ensure!(metadata.is_file(), "{shown} is neither a block device nor a file");
            return Ok(Self { path: path.to_owned(), name, disk: None });
        }
        let (major, minor) = (libc::major(metadata.rdev()), libc::minor(metadata.rdev()));
        let (name, disk) = Disk::find(major, minor, root).with_context(|| format!("{shown}"))?;
        Ok(Self { path: path.to_owned(), name, disk: Some(disk) })
    }

    /// Whether it may be erased.
    fn check(&self, force: bool) -> Result<()> {
        let path = self.path.display();
        let Some(disk) = &self.disk else {
            ensure!(force, "{path} is not a block device; --force writes to it all the same");
            return Ok(());
        };
        ensure!(disk.users.is_empty(), "{path} is in use:\n{}", disk.users.join("\n"));
        ensure!(!disk.read_only, "{path} is write-protected");
        ensure!(disk.bytes > 0, "{path} has no medium in it");
        ensure!(
            disk.removable || force,
            "{path} ({}, {}) is neither removable nor on USB; --force erases it all the same",
            disk.model,
            HumanBytes(disk.bytes)
        );
        Ok(())
    }

    /// Opens it so that nobody can mount it meanwhile.
    fn open(&self) -> Result<File> {
        let path = self.path.display();
        let exclusive = if self.disk.is_some() { libc::O_EXCL } else { 0 };
        let opened =
            File::options().read(true).write(true).custom_flags(exclusive).open(&self.path);
        opened.map_err(|why| match why.raw_os_error() {
            Some(libc::EACCES | libc::EPERM) => anyhow::anyhow!(
                "no permission to write {path}. Make the image as yourself, then write it as root:\n  \
                 cargo xtask image --out stick.img\n  sudo {} flash --image stick.img {path}",
                std::env::current_exe().unwrap_or_else(|_| "target/debug/xtask".into()).display()
            ),
            Some(libc::EBUSY) => {
                anyhow::anyhow!("{path} is in use: unmount its partitions and close what uses it")
            }
            _ => anyhow::Error::from(why).context(format!("cannot open {path}")),
        })
    }
}

impl Disk {
    /// Name and description of the disk with this number.
    fn find(major: u32, minor: u32, root: &Path) -> Result<(String, Self)> {
        let link = root.join(format!("sys/dev/block/{major}:{minor}"));
        let directory = fs::canonicalize(&link)
            .with_context(|| format!("the kernel does not know it ({})", link.display()))?;
        let name = name_of(&directory);
        if directory.join("partition").exists() {
            let disk = directory.parent().map(name_of).unwrap_or_default();
            bail!("this is a partition; give the whole disk, /dev/{disk}");
        }
        let mut partitions = Vec::new();
        let mut numbers = vec![(format!("{major}:{minor}"), name.clone())];
        let mut users = holders(&directory);
        for entry in fs::read_dir(&directory)? {
            let below = entry?.path();
            if !below.join("partition").exists() {
                continue;
            }
            let name = name_of(&below);
            users.extend(holders(&below));
            numbers.push((attribute(&below, "dev"), name.clone()));
            let bytes = sectors(&below);
            partitions.push(Partition { label: label(root, &name), name, bytes });
        }
        partitions.sort_by(|a, b| (a.name.len(), &a.name).cmp(&(b.name.len(), &b.name)));
        users.extend(mounts(root, &numbers)?);
        users.extend(swaps(root, &numbers)?);
        let model = ["vendor", "model"].map(|name| attribute(&directory.join("device"), name));
        let model = model.join(" ").trim().to_owned();
        let on_usb = directory.components().any(|part| {
            let part = part.as_os_str().to_string_lossy();
            part.strip_prefix("usb")
                .is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
        });
        let disk = Self {
            model: if model.is_empty() { "unknown model".to_owned() } else { model },
            bytes: sectors(&directory),
            removable: on_usb || attribute(&directory, "removable") == "1",
            read_only: attribute(&directory, "ro") == "1",
            partitions,
            users,
        };
        Ok((name, disk))
    }
}

fn name_of(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// A file of sysfs; empty where there is none.
fn attribute(directory: &Path, name: &str) -> String {
    fs::read_to_string(directory.join(name)).unwrap_or_default().trim().to_owned()
}

/// Size in bytes. Sectors of sysfs have 512 bytes, whatever the disk's have.
fn sectors(directory: &Path) -> u64 {
    attribute(directory, "size").parse::<u64>().unwrap_or(0).saturating_mul(512)
}

/// Label of a partition's file system or, without that, of the partition.
fn label(root: &Path, name: &str) -> Option<String> {
    ["by-label", "by-partlabel"].iter().find_map(|kind| {
        let links = fs::read_dir(root.join("dev/disk").join(kind)).ok()?;
        links.flatten().find_map(|link| {
            let target = fs::read_link(link.path()).ok()?;
            (name_of(&target) == name).then(|| name_of(&link.path()).replace(r"\x20", " "))
        })
    })
}

/// Devices that are made of this one.
fn holders(directory: &Path) -> Vec<String> {
    let holders = fs::read_dir(directory.join("holders")).into_iter().flatten().flatten();
    holders
        .map(|holder| format!("  {} is part of {}", name_of(directory), name_of(&holder.path())))
        .collect()
}

/// Where any of these devices is mounted (proc_pid_mountinfo(5)).
fn mounts(root: &Path, numbers: &[(String, String)]) -> Result<Vec<String>> {
    let file = root.join("proc/self/mountinfo");
    let text =
        fs::read_to_string(&file).with_context(|| format!("cannot read {}", file.display()))?;
    let mounts = text.lines().filter_map(|line| {
        let (fields, rest) = line.split_once(" - ")?;
        let fields: Vec<&str> = fields.split(' ').collect();
        let source = rest.split(' ').nth(1)?;
        // Some file systems have a number of their own.
        let found = numbers.iter().find(|(number, name)| {
            fields.get(2) == Some(&number.as_str()) || source == format!("/dev/{name}")
        });
        let (_, name) = found?;
        let point = unescape(fields.get(4)?);
        Some(format!("  {name} is mounted at {point}: umount '{point}'"))
    });
    Ok(mounts.collect())
}

fn swaps(root: &Path, numbers: &[(String, String)]) -> Result<Vec<String>> {
    let file = root.join("proc/swaps");
    let text = match fs::read_to_string(&file) {
        Ok(text) => text,
        // A kernel without swap.
        Err(why) if why.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(why) => return Err(why).with_context(|| format!("cannot read {}", file.display())),
    };
    let used = text.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    let ours = used.filter(|used| numbers.iter().any(|(_, name)| *used == format!("/dev/{name}")));
    Ok(ours.map(|used| format!("  {used} is swap: swapoff {used}")).collect())
}

/// Blanks and the like are written as three octal digits.
fn unescape(text: &str) -> String {
    let mut result = text.to_owned();
    for (escaped, meant) in [(r"\040", " "), (r"\011", "\t"), (r"\012", "\n"), (r"\134", r"\")] {
        result = result.replace(escaped, meant);
    }
    result
}

/// Has the name typed.
fn ask(name: &str, input: &mut dyn BufRead) -> Result<()> {
    eprint!("Type {name} to erase it and go on: ");
    let mut typed = String::new();
    input.read_line(&mut typed)?;
    ensure!(typed.trim() == name, "not {name}: nothing was written");
    Ok(())
}

/// Shows how far it is.
trait Progress {
    fn begin(&mut self, what: &'static str, bytes: u64);
    fn at(&mut self, bytes: u64);
}

#[derive(Default)]
struct Bar(Option<ProgressBar>);

impl Progress for Bar {
    fn begin(&mut self, what: &'static str, bytes: u64) {
        let bar = ProgressBar::new(bytes);
        if bar.is_hidden() {
            eprintln!("{what} …");
        }
        let style = "{prefix:9} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.set_prefix(what);
        self.0 = Some(bar);
    }

    fn at(&mut self, bytes: u64) {
        if let Some(bar) = &self.0 {
            bar.set_position(bytes);
            if Some(bytes) == bar.length() {
                bar.finish();
            }
        }
    }
}

/// How much is written at once, in bytes. Each is made to reach the medium, so that the progress shown is true.
const CHUNK: usize = 4 << 20;

/// Writes all `bytes` of `image` to the start of `device`, and compares. `settle` makes what was written reach the
/// medium and what is read come from there.
fn flash<D: Read + Write + Seek>(
    image: &mut (impl Read + Seek),
    device: &mut D,
    bytes: u64,
    settle: &mut dyn FnMut(&mut D) -> io::Result<()>,
    progress: &mut dyn Progress,
) -> Result<()> {
    let mib = |at: u64| format!("at {} MiB", at >> 20);
    let (mut wanted, mut found) = (vec![0; CHUNK], vec![0; CHUNK]);
    let chunks = |at: u64| usize::try_from(bytes - at).map_or(CHUNK, |left| left.min(CHUNK));

    progress.begin("writing", bytes);
    image.rewind()?;
    device.rewind()?;
    let mut at = 0;
    while at < bytes {
        let wanted = &mut wanted[..chunks(at)];
        image.read_exact(wanted).context("cannot read the image")?;
        let written = device.write_all(wanted).and_then(|()| device.flush());
        written.and_then(|()| settle(device)).with_context(|| {
            format!(
                "cannot write {}: the stick is broken, smaller than it says, or was pulled out",
                mib(at)
            )
        })?;
        at += wanted.len() as u64;
        progress.at(at);
    }

    progress.begin("verifying", bytes);
    image.rewind()?;
    device.rewind()?;
    at = 0;
    while at < bytes {
        let (wanted, found) = (&mut wanted[..chunks(at)], &mut found[..chunks(at)]);
        image.read_exact(wanted).context("cannot read the image")?;
        device.read_exact(found).with_context(|| format!("cannot read back {}", mib(at)))?;
        if let Some(differs) = wanted.iter().zip(found.iter()).position(|(a, b)| a != b) {
            bail!(
                "what was read back at byte {} is not what was written: the stick is broken or \
                 smaller than it says; use another one",
                at + differs as u64
            );
        }
        at += wanted.len() as u64;
        progress.at(at);
    }
    Ok(())
}

/// Moves the second partition table from the image's end to the device's, where it belongs.
fn adapt<D: Read + Write + Seek + fmt::Debug>(device: &mut D) -> Result<()> {
    /// Offset in the boot record of the number of sectors of its first partition, the protective one.
    const PROTECTED: u64 = 0x1be + 12;

    let sectors = device.seek(SeekFrom::End(0))? / 512;
    let mut table = gpt::GptConfig::new().writable(true).open_from_device(&mut *device)?;
    if table.header().backup_lba == sectors - 1 {
        return Ok(());
    }
    let partitions = table.take_partitions();
    table.update_partitions(partitions)?;
    table.write()?;
    device.seek(SeekFrom::Start(PROTECTED))?;
    device.write_all(&u32::try_from(sectors - 1).unwrap_or(u32::MAX).to_le_bytes())?;
    Ok(device.flush()?)
}

/// Has the kernel read the partition table again (linux/fs.h).
const BLKRRPART: libc::c_ulong = 0x125f;
/// Writes the kernel's buffers of a block device and forgets them (linux/fs.h).
const BLKFLSBUF: libc::c_ulong = 0x1261;

trait Medium {
    /// What was written is on the medium, and reads go there.
    fn settle(&mut self) -> io::Result<()>;
    /// A request that takes no argument.
    fn control(&self, request: libc::c_ulong) -> io::Result<()>;
}

impl Medium for File {
    fn settle(&mut self) -> io::Result<()> {
        self.sync_data()?;
        // Only root may say this for a block device; the advice below does as well if it is taken.
        if self.metadata()?.file_type().is_block_device() && self.control(BLKFLSBUF).is_ok() {
            return Ok(());
        }
        // SAFETY: the descriptor is open; the call touches none of our memory.
        match unsafe { libc::posix_fadvise(self.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) } {
            0 => Ok(()),
            why => Err(io::Error::from_raw_os_error(why)),
        }
    }

    fn control(&self, request: libc::c_ulong) -> io::Result<()> {
        // SAFETY: the descriptor is open, and these requests read no argument.
        match unsafe { libc::ioctl(self.as_raw_fd(), request as _, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;
    use std::os::unix::fs::symlink;

    use super::*;
    use crate::image::tests::Sample;

    /// A stick that goes wrong.
    #[derive(Debug, Default)]
    struct Faulty {
        memory: Cursor<Vec<u8>>,
        /// Written, but something else.
        corrupt: Option<usize>,
        /// Cannot be written from here on.
        fails: Option<u64>,
        settled: usize,
    }

    impl Faulty {
        fn of(bytes: usize) -> Self {
            Self { memory: Cursor::new(vec![0xff; bytes]), ..Self::default() }
        }
    }

    impl Read for Faulty {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.memory.read(buffer)
        }
    }

    impl Write for Faulty {
        fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
            let at = self.memory.position();
            if self.fails.is_some_and(|from| at + buffer.len() as u64 > from) {
                return Err(io::ErrorKind::StorageFull.into());
            }
            let room = self.memory.get_ref().len() - at as usize;
            let written = self.memory.write(&buffer[..buffer.len().min(room)])?;
            if let Some(byte) = self.corrupt.filter(|byte| (at as usize..).contains(byte))
                && let Some(byte) = self.memory.get_mut().get_mut(byte)
            {
                *byte ^= 4;
            }
            Ok(written)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Seek for Faulty {
        fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
            self.memory.seek(to)
        }
    }

    /// Counts what is shown.
    #[derive(Default)]
    struct Shown(Vec<(&'static str, u64, u64)>);

    impl Progress for Shown {
        fn begin(&mut self, what: &'static str, bytes: u64) {
            self.0.push((what, bytes, 0));
        }

        fn at(&mut self, bytes: u64) {
            self.0.last_mut().unwrap().2 = bytes;
        }
    }

    fn flash_to(device: &mut Faulty, image: &[u8]) -> Result<Shown> {
        let mut shown = Shown::default();
        let mut settle = |device: &mut Faulty| {
            device.settled += 1;
            Ok(())
        };
        flash(&mut Cursor::new(image), device, image.len() as u64, &mut settle, &mut shown)?;
        Ok(shown)
    }

    /// No whole number of chunks, partly zero.
    fn image() -> Vec<u8> {
        (0..2 * CHUNK + 5000).map(|i| if i < CHUNK { (i / 7) as u8 } else { 0 }).collect()
    }

    #[test]
    fn an_image_is_written_with_its_zeros_and_read_back() {
        let image = image();
        let mut device = Faulty::of(image.len() + 100);
        let shown = flash_to(&mut device, &image).unwrap();
        let all = image.len() as u64;
        assert_eq!(shown.0, [("writing", all, all), ("verifying", all, all)]);
        assert_eq!(device.memory.get_ref()[..image.len()], image);
        assert_eq!(device.memory.get_ref()[image.len()..], [0xff; 100]);
        assert_eq!(device.settled, 3);
    }

    #[test]
    fn one_wrong_bit_is_found() {
        let image = image();
        for byte in [0, CHUNK, image.len() - 1] {
            let mut device = Faulty { corrupt: Some(byte), ..Faulty::of(image.len()) };
            let why = flash_to(&mut device, &image).err().unwrap().to_string();
            assert!(why.contains(&format!("at byte {byte} is not")), "{why}");
        }
    }

    #[test]
    fn a_stick_that_fails_or_ends_is_told_with_the_place() {
        let image = image();
        let mut full = Faulty { fails: Some(CHUNK as u64), ..Faulty::of(image.len()) };
        let why = format!("{:#}", flash_to(&mut full, &image).err().unwrap());
        assert!(why.contains("cannot write at 4 MiB"), "{why}");
        let why = flash_to(&mut Faulty::of(image.len() - 1), &image).err().unwrap().to_string();
        assert!(why.contains("cannot write at 8 MiB"), "{why}");
        let mut settle = |_: &mut Faulty| Err(io::Error::from_raw_os_error(libc::EIO));
        let (device, shown) = (&mut Faulty::of(image.len()), &mut Shown::default());
        let all = image.len() as u64;
        let why = flash(&mut Cursor::new(&image), device, all, &mut settle, shown).unwrap_err();
        assert!(why.to_string().contains("cannot write at 0 MiB"), "{why}");
    }

    #[test]
    fn the_second_table_moves_to_the_end() {
        let mut device = Cursor::new(Sample::default().image());
        let before = device.get_ref().clone();
        adapt(&mut device).unwrap();
        assert!(*device.get_ref() == before);
        let sectors = before.len() / 512 + 5000;
        device.get_mut().resize(sectors * 512, 0xff);
        adapt(&mut device).unwrap();

        let table = gpt::GptConfig::new().only_valid_headers(true);
        let table = table.open_from_device(&mut device).unwrap();
        assert_eq!(table.header().backup_lba, sectors as u64 - 1);
        assert_eq!(table.header().last_usable, sectors as u64 - 34);
        assert_eq!(table.backup_header().unwrap().current_lba, sectors as u64 - 1);
        let names: Vec<&str> = table.partitions().values().map(|p| &*p.name).collect();
        assert_eq!(names, ["unsplit loader", "UNSPLIT"]);
        let after = device.get_ref();
        assert_eq!(after[0x1be + 12..][..4], (sectors as u32 - 1).to_le_bytes());
        assert_eq!(after[..0x1be], before[..0x1be]);
        assert_eq!(after[0x1be + 16..512], before[0x1be + 16..512]);
    }

    /// A root directory with `sys`, `proc` and `dev`, removed when dropped.
    struct Root(PathBuf);

    impl Root {
        /// With the stick `sdb`, 8:16, which has the partitions `sdb1` and `sdb2`, and the built-in disk `sda`, 8:0.
        fn new(name: &str) -> Self {
            let root = std::env::temp_dir().join(format!("unsplit-{name}-{}", std::process::id()));
            let root = Self(root);
            let usb = "sys/devices/pci0/usb2/2-1/host6/block/sdb";
            let ata = "sys/devices/pci0/ata1/block/sda";
            root.disk(usb, "8:16", 30_000_000, "0");
            root.disk(ata, "8:0", 500_000_000, "0");
            root.write(&format!("{usb}/device/vendor"), "Kingston\n");
            root.write(&format!("{usb}/device/model"), "DataTraveler 3.0   \n");
            for (number, name) in [("8:17", "sdb1"), ("8:18", "sdb2")] {
                let partition = format!("{usb}/{name}");
                root.write(&format!("{partition}/partition"), &name[3..]);
                root.disk(&partition, number, 1_000_000, "0");
            }
            fs::create_dir_all(root.0.join("dev/disk/by-label")).unwrap();
            symlink("../../sdb2", root.0.join(r"dev/disk/by-label/MY\x20PHOTOS")).unwrap();
            root.write("proc/self/mountinfo", "22 1 8:1 / / rw shared:1 - ext4 /dev/sda1 rw\n");
            root.write(
                "proc/swaps",
                "Filename Type Size Used Priority\n/dev/sda2 partition 1 0 -2\n",
            );
            root
        }

        fn disk(&self, at: &str, number: &str, sectors: u64, removable: &str) {
            self.write(&format!("{at}/size"), &format!("{sectors}\n"));
            self.write(&format!("{at}/dev"), number);
            self.write(&format!("{at}/ro"), "0\n");
            self.write(&format!("{at}/removable"), removable);
            fs::create_dir_all(self.0.join("sys/dev/block")).unwrap();
            symlink(self.0.join(at), self.0.join("sys/dev/block").join(number)).unwrap();
        }

        fn write(&self, file: &str, text: &str) {
            let file = self.0.join(file);
            fs::create_dir_all(file.parent().unwrap()).unwrap();
            fs::write(file, text).unwrap();
        }

        fn target(&self, minor: u32) -> Target {
            let (name, disk) = Disk::find(8, minor, &self.0).unwrap();
            Target { path: format!("/dev/{name}").into(), name, disk: Some(disk) }
        }

        fn refused(&self, minor: u32) -> String {
            self.target(minor).check(false).unwrap_err().to_string()
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn a_usb_stick_is_taken_and_described() {
        let root = Root::new("flash-usb");
        let target = root.target(16);
        target.check(false).unwrap();
        assert_eq!(target.name, "sdb");
        let shown = target.to_string();
        assert!(shown.contains("/dev/sdb: Kingston DataTraveler 3.0, 14.31 GiB"), "{shown}");
        assert!(shown.contains("sdb1: 488.28 MiB, no label\n"), "{shown}");
        assert!(shown.contains("sdb2: 488.28 MiB, MY PHOTOS\n"), "{shown}");
    }

    #[test]
    fn built_in_disks_and_partitions_are_refused() {
        let root = Root::new("flash-fixed");
        let refused = root.refused(0);
        assert!(refused.contains("neither removable nor on USB"), "{refused}");
        root.target(0).check(true).unwrap();
        root.write("sys/devices/pci0/ata1/block/sda/removable", "1\n");
        root.target(0).check(false).unwrap();
        let partition = Disk::find(8, 17, &root.0).unwrap_err().to_string();
        assert!(partition.contains("whole disk, /dev/sdb"), "{partition}");
        assert!(Disk::find(8, 99, &root.0).is_err());
    }

    #[test]
    fn what_is_in_use_is_refused_even_by_force() {
        let root = Root::new("flash-used");
        let mount = r"40 22 8:18 / /media/my\040photos rw - vfat /dev/sdb2 rw";
        root.write("proc/self/mountinfo", &format!("{mount}\n"));
        let refused = root.refused(16);
        assert!(refused.contains("sdb2 is mounted at /media/my photos: umount"), "{refused}");
        assert!(root.target(16).check(true).is_err());
        // By the name of the device where the number is the file system's own.
        root.write("proc/self/mountinfo", "40 22 0:55 /sub /data rw - btrfs /dev/sdb1 rw\n");
        assert!(root.refused(16).contains("sdb1 is mounted at /data"));
        root.write("proc/self/mountinfo", "");
        root.write("proc/swaps", "Filename Type\n/dev/sdb1 partition\n");
        assert!(root.refused(16).contains("swapoff /dev/sdb1"));
        root.write("proc/swaps", "Filename Type\n");
        let holder = "sys/devices/pci0/usb2/2-1/host6/block/sdb/sdb1/holders/dm-0";
        root.write(holder, "");
        assert!(root.refused(16).contains("sdb1 is part of dm-0"));
    }

    #[test]
    fn protected_and_empty_drives_are_told_so() {
        let root = Root::new("flash-empty");
        root.write("sys/devices/pci0/usb2/2-1/host6/block/sdb/ro", "1\n");
        assert!(root.refused(16).contains("write-protected"));
        root.write("sys/devices/pci0/usb2/2-1/host6/block/sdb/ro", "0\n");
        root.write("sys/devices/pci0/usb2/2-1/host6/block/sdb/size", "0\n");
        assert!(root.refused(16).contains("no medium"));
    }

    #[test]
    fn files_need_force_and_other_things_are_refused() {
        let target = Target::find(&std::env::current_exe().unwrap(), Path::new("/")).unwrap();
        let refused = target.check(false).unwrap_err().to_string();
        assert!(refused.contains("not a block device; --force"), "{refused}");
        target.check(true).unwrap();
        for (path, why) in [("/dev/null", "neither"), ("/nonexistent/sdx", "lsblk")] {
            let refused = Target::find(Path::new(path), Path::new("/")).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
        }
    }

    #[test]
    fn only_the_name_is_consent() {
        ask("sdb", &mut &b"sdb\n"[..]).unwrap();
        for typed in ["", "\n", "y\n", "/dev/sdc\n", "sdb1\n"] {
            let refused = ask("sdb", &mut typed.as_bytes()).unwrap_err().to_string();
            assert!(refused.contains("nothing was written"), "{typed}");
        }
    }
}
