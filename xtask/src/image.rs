//! The stick: a disk image that BIOS and UEFI boot, with the files that people put on it.
//!
//! Its first sector is the boot record. A GUID partition table names two partitions: what the boot
//! record loads, and a FAT volume with everything else. The same input makes the same bytes.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use boot::disk::{LOADER_LBA_OFFSET, LOADER_SUM_OFFSET, SECTOR, Table, checksum};
use boot::kernel::Kernel;
use boot::{log, stick};
use fatfs::{FileSystem, FormatVolumeOptions, FsOptions};
use gpt::partition::Partition;
use gpt::partition_types::{self, Type};
use object::elf::{FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use object::{LittleEndian, build};
use uuid::{Uuid, uuid};

use crate::pe;

/// Where the BIOS puts the boot record, and the lowest address of the linked BIOS stage.
const LOAD_ADDRESS: u64 = 0x7c00;

/// Offset of the partition table in the boot record.
const PARTITIONS_OFFSET: usize = 0x1be;

/// First sector of the partition with what the boot record loads: the first one after the table.
const LOADER_LBA: u64 = 34;
/// First sector of the partition with the files, at 1 MiB.
const FILES_LBA: u64 = 2048;
/// Sectors of the table's copy at the end of the disk.
const BACKUP_SECTORS: u64 = 33;

/// Name of the partition with the files, and label of its volume.
pub const LABEL: &str = "UNSPLIT";
const LOADER_LABEL: &str = "unsplit loader";
/// For people: what the stick is.
pub const README: &str = "README.txt";

const DISK_GUID: Uuid = uuid!("7e1d2a4c-9b1f-4c8e-a6d3-0f5b8c2e4a10");
const LOADER_GUID: Uuid = uuid!("7e1d2a4c-9b1f-4c8e-a6d3-0f5b8c2e4a11");
const FILES_GUID: Uuid = uuid!("7e1d2a4c-9b1f-4c8e-a6d3-0f5b8c2e4a12");
/// Serial number of the volume.
const VOLUME_ID: u32 = 0x0533_0029;

const KIB: u64 = 1024;
const MIB: u64 = 1024 * KIB;
/// The smallest image: a FAT of 16 bits wants some thousand clusters.
const SMALLEST: u64 = 8 * MIB;
/// The sizes that can be asked for, in MiB.
pub const SIZES: std::ops::RangeInclusive<i64> = 8..=65536;
/// Room that is left for the log, which the loader may write anew before it removes the old one.
const LOG_ROOM: u64 = 2 * log::BYTES;
/// The largest cluster of images up to 8 GiB.
const USUAL_CLUSTER: u64 = 4 * KIB;

/// Parts of a stick.
pub struct ImageSpec<'a> {
    /// The linked BIOS stage, an ELF file.
    pub bios: &'a Path,
    /// The linked UEFI loader, an ELF file.
    pub uefi: &'a Path,
    /// The kernel, an ELF file.
    pub kernel: &'a Path,
    /// The text of `hv.toml`.
    pub config: &'a str,
    /// Path on the stick, which must be in `guests/`, and source of every image.
    pub guests: &'a [(String, PathBuf)],
    /// How large it is.
    pub size: Size,
    /// The image to be written.
    pub out: &'a Path,
}

/// How large an image is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Size {
    /// As small as its files allow, in whole cylinders.
    Smallest,
    /// So many MiB.
    Mib(u32),
}

/// The shape of a disk image, whose size is a whole number of cylinders: emulators that are told of
/// a disk by its geometry see all of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Number of cylinders.
    pub cylinders: u64,
}

impl Geometry {
    /// Tracks of a cylinder: what Bochs assumes unless told otherwise.
    pub const HEADS: u64 = 16;
    /// Sectors of a track: the same.
    pub const SECTORS_PER_TRACK: u64 = 63;
    const CYLINDER: u64 = Self::HEADS * Self::SECTORS_PER_TRACK * SECTOR as u64;

    fn holding(bytes: u64) -> Self {
        Self { cylinders: bytes.div_ceil(Self::CYLINDER) }
    }

    /// Size of the disk in bytes.
    pub fn bytes(&self) -> u64 {
        self.cylinders * Self::CYLINDER
    }
}

/// Writes an image. The kernel is checked as the loader will check it, which includes that nothing
/// in it is both writable and executable.
///
/// # Errors
/// If a part is not what it should be, the files do not fit, or the image cannot be written.
pub fn write(spec: &ImageSpec<'_>) -> Result<()> {
    let content = Content::new(spec)?;
    let bytes = match spec.size {
        Size::Smallest => content.smallest(),
        Size::Mib(mib) => u64::from(mib) * MIB,
    };
    let shown = spec.out.display();
    if let Ok(there) = fs::metadata(spec.out) {
        ensure!(there.is_file(), "{shown} is not a file; to write to a stick: cargo xtask flash");
    }
    let mut file = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(spec.out)
        .with_context(|| format!("cannot write {shown}"))?;
    let written = file
        .set_len(bytes)
        .map_err(anyhow::Error::from)
        .and_then(|()| content.write(&mut file, bytes));
    if written.is_err() {
        // Half an image is of no use; the error that is reported is the first one.
        let _ = fs::remove_file(spec.out);
    }
    written.with_context(|| format!("cannot write {shown}"))
}

/// All that is on a stick.
struct Content {
    /// The BIOS stage from the boot record on, in whole sectors.
    bios: Vec<u8>,
    /// The files by their paths.
    files: BTreeMap<String, Vec<u8>>,
}

impl Content {
    fn new(spec: &ImageSpec<'_>) -> Result<Self> {
        let bios = flatten(&read(spec.bios)?)
            .with_context(|| format!("{} is not a BIOS stage", spec.bios.display()))?;
        let uefi = pe::from_elf(&read(spec.uefi)?)
            .with_context(|| format!("{} is not a UEFI loader", spec.uefi.display()))?;
        let kernel = stripped(&read(spec.kernel)?)
            .with_context(|| format!("{} is not a kernel", spec.kernel.display()))?;
        let mut files = BTreeMap::from([
            (stick::UEFI_LOADER.to_owned(), uefi),
            (stick::KERNEL_SUM.to_owned(), format!("{:016x}\n", checksum(&kernel)).into_bytes()),
            (stick::KERNEL.to_owned(), kernel),
            (stick::CONFIG.to_owned(), spec.config.as_bytes().to_vec()),
            (README.to_owned(), readme().into_bytes()),
        ]);
        check_names(spec.guests.iter().map(|(path, _)| path.as_str()))?;
        for (path, source) in spec.guests {
            files.insert(path.clone(), read(source)?);
        }
        Ok(Self { bios, files })
    }

    /// All directories, those above before those below them.
    fn directories(&self) -> Vec<&str> {
        let above = |path: &'_ str| path.match_indices('/').map(|(at, _)| at).collect::<Vec<_>>();
        let mut directories: Vec<&str> = self
            .files
            .keys()
            .flat_map(|path| above(path).into_iter().map(|at| &path[..at]))
            // Is there for people to put something in.
            .chain([stick::GUESTS])
            .collect();
        directories.sort_unstable();
        directories.dedup();
        directories
    }

    /// Size in bytes of all files and directories in clusters of this size, the log's included.
    fn bytes(&self, cluster: u64) -> u64 {
        /// What a directory's entry takes at most: that of the name in UTF-16 and its short form.
        const ENTRY: u64 = 32 * 21;
        let clusters = |bytes: u64| bytes.next_multiple_of(cluster);
        let files: u64 = self.files.values().map(|file| clusters(file.len() as u64)).sum();
        let entries = (self.files.len() as u64 + 3) * ENTRY;
        let directories = self.directories().len() as u64 * cluster + clusters(entries);
        files + directories + clusters(LOG_ROOM)
    }

    /// Size of the smallest image with all of it.
    fn smallest(&self) -> u64 {
        let files = self.bytes(USUAL_CLUSTER);
        // Boot sector and root directory; the two allocation tables take less than a hundredth.
        let volume = 32 * KIB + files + files / 100;
        let around = (FILES_LBA + BACKUP_SECTORS) * SECTOR as u64;
        Geometry::holding((around + volume).max(SMALLEST)).bytes()
    }

    fn write<D: Read + Write + Seek + Debug>(&self, device: &mut D, bytes: u64) -> Result<()> {
        let sectors = bytes / SECTOR as u64;
        let last = sectors - BACKUP_SECTORS - 1;
        let files = FILES_LBA..last + 1;
        self.write_files(device, files.start, files.end - files.start)?;

        let table =
            Table { partition_lba: files.start, partition_sectors: files.end - files.start };
        let mut bios = self.bios.clone();
        complete(&mut bios, &table, sectors)?;
        let (record, rest) = bios.split_at(SECTOR);
        ensure!(
            rest.len() as u64 <= (FILES_LBA - LOADER_LBA) * SECTOR as u64,
            "the BIOS stage is larger than its partition"
        );
        for (lba, bytes) in [(0, record), (LOADER_LBA, rest)] {
            device.seek(SeekFrom::Start(lba * SECTOR as u64))?;
            device.write_all(bytes)?;
        }

        let partition = |name: &str, kind: Type, guid, first, last| Partition {
            part_type_guid: kind,
            part_guid: guid,
            first_lba: first,
            last_lba: last,
            flags: 0,
            name: name.to_owned(),
        };
        let (bios, basic) = (partition_types::BIOS, partition_types::BASIC);
        let mut table =
            gpt::GptConfig::new().writable(true).create_from_device(device, Some(DISK_GUID))?;
        table.update_partitions(BTreeMap::from([
            (1, partition(LOADER_LABEL, bios, LOADER_GUID, LOADER_LBA, FILES_LBA - 1)),
            (2, partition(LABEL, basic, FILES_GUID, files.start, files.end - 1)),
        ]))?;
        table.write()?;
        Ok(())
    }

    fn write_files<D: Read + Write + Seek>(
        &self,
        device: &mut D,
        lba: u64,
        sectors: u64,
    ) -> Result<()> {
        let mut volume = Window::new(device, lba * SECTOR as u64, sectors * SECTOR as u64)?;
        format(&mut volume, lba, sectors)?;
        let options = || FsOptions::new().time_provider(&Timeless);
        let directories = FileSystem::new(&mut volume, options())?;
        for directory in self.directories() {
            let created = directories.root_dir().create_dir(directory);
            created.map(drop).with_context(|| format!("directory {directory}"))?;
        }
        directories.unmount()?;
        mend_directories(&mut volume)?;

        let volume = FileSystem::new(&mut volume, options())?;
        let cluster = u64::from(volume.cluster_size());
        let (room, needed) =
            (u64::from(volume.stats()?.free_clusters()) * cluster, self.bytes(cluster));
        ensure!(
            needed <= room,
            "the files take {} MiB, an image of this size has room for {} MiB: give it --size {}",
            needed.div_ceil(MIB),
            room / MIB,
            self.smallest().div_ceil(MIB)
        );
        let root = volume.root_dir();
        for (path, bytes) in &self.files {
            let write = || root.create_file(path)?.write_all(bytes);
            write().with_context(|| format!("file {path}"))?;
        }
        drop(root);
        volume.unmount()?;
        Ok(())
    }
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Makes an empty volume. No number of clusters is near one of the limits between the kinds of FAT:
/// not all programs agree on these.
fn format<D: Read + Write + Seek>(volume: &mut Window<D>, lba: u64, sectors: u64) -> Result<()> {
    /// Offset in the boot sector of the number of sectors before the volume.
    const HIDDEN_SECTORS: u64 = 0x1c;
    /// Where the boot sector's copy is, if there is one.
    const COPY: u64 = 6;

    let cluster = match sectors * SECTOR as u64 / MIB {
        // 16 bits: 7168 to 40960 clusters.
        ..16 => KIB,
        16..64 => 2 * KIB,
        64..160 => 4 * KIB,
        // 32 bits: from 81920 clusters on.
        160..512 => 2 * KIB,
        512..8192 => 4 * KIB,
        8192..16384 => 8 * KIB,
        _ => 16 * KIB,
    };
    let mut label = [b' '; 11];
    label[..LABEL.len()].copy_from_slice(LABEL.as_bytes());
    let options = FormatVolumeOptions::new()
        .bytes_per_cluster(cluster.try_into()?)
        .total_sectors(sectors.try_into()?)
        .volume_id(VOLUME_ID)
        .volume_label(label);
    volume.rewind()?;
    fatfs::format_volume(&mut *volume, options)?;
    let mut first = [0; SECTOR];
    volume.rewind()?;
    volume.read_exact(&mut first)?;
    let has_copy = first[0x52..0x57] == *b"FAT32";
    for sector in [Some(0), has_copy.then_some(COPY)].into_iter().flatten() {
        volume.seek(SeekFrom::Start(sector * SECTOR as u64 + HIDDEN_SECTORS))?;
        volume.write_all(&u32::try_from(lba)?.to_le_bytes())?;
    }
    volume.rewind()?;
    Ok(())
}

/// Makes the entries `.` and `..` of new directories what Microsoft's specification ("FAT Directory Structure")
/// says, which not all programs can do without: the two come first, where `fatfs` puts a long name before each; and
/// the root directory above is cluster 0, whatever its number.
fn mend_directories<D: Read + Write + Seek>(volume: &mut Window<D>) -> Result<()> {
    const ENTRY: usize = 32;
    const ATTRIBUTES: usize = 11;
    const LONG_NAME: u8 = 0x0f;
    const DIRECTORY: u8 = 0x10;

    let mut boot = [0; SECTOR];
    volume.rewind()?;
    volume.read_exact(&mut boot)?;
    let half = |bytes: &[u8], at: usize| u64::from(u16::from_le_bytes([bytes[at], bytes[at + 1]]));
    let whole = |bytes: &[u8], at: usize| half(bytes, at) | half(bytes, at + 2) << 16;
    let sectors_per_cluster = u64::from(boot[0x0d]);
    let (reserved, tables, root_entries) =
        (half(&boot, 0x0e), u64::from(boot[0x10]), half(&boot, 0x11));
    let table = match half(&boot, 0x16) {
        0 => whole(&boot, 0x24),
        sectors => sectors,
    };
    let root = reserved + tables * table;
    let clusters = root + (root_entries * ENTRY as u64).div_ceil(SECTOR as u64);
    let place = |cluster: u64| (clusters + (cluster - 2) * sectors_per_cluster) * SECTOR as u64;

    // The directories are new and small: each is in one cluster, or in as much of the root directory.
    let root_cluster = if root_entries == 0 { whole(&boot, 0x2c) } else { 0 };
    let root = if root_entries == 0 { place(root_cluster) } else { root * SECTOR as u64 };
    let mut found = vec![root];
    let mut entries = vec![0; sectors_per_cluster as usize * SECTOR];
    while let Some(at) = found.pop() {
        volume.seek(SeekFrom::Start(at))?;
        volume.read_exact(&mut entries)?;
        let is_dot = |entry: &[u8]| entry[0] == b'.' && entry[ATTRIBUTES] == DIRECTORY;
        let mut kept = Vec::new();
        for (index, entry) in entries.chunks_exact(ENTRY).enumerate() {
            let next = entries.get((index + 1) * ENTRY..(index + 2) * ENTRY);
            if entry[ATTRIBUTES] == LONG_NAME && next.is_some_and(is_dot) {
                continue;
            }
            let cluster = half(entry, 0x14) << 16 | half(entry, 0x1a);
            kept.extend_from_slice(entry);
            if entry[ATTRIBUTES] == DIRECTORY && !is_dot(entry) {
                found.push(place(cluster));
            } else if is_dot(entry) && cluster == root_cluster {
                let start = kept.len() - ENTRY;
                kept[start + 0x14..start + 0x16].fill(0);
                kept[start + 0x1a..start + 0x1c].fill(0);
            }
        }
        kept.resize(entries.len(), 0);
        volume.seek(SeekFrom::Start(at))?;
        volume.write_all(&kept)?;
    }
    volume.rewind()?;
    Ok(())
}

/// The images' paths must be such that the loader finds the files and FAT can name them.
fn check_names<'a>(paths: impl ExactSizeIterator<Item = &'a str>) -> Result<()> {
    /// In UTF-16 units.
    const LONGEST: usize = 255;

    ensure!(paths.len() <= stick::MAX_FILES, "more than {} images", stick::MAX_FILES);
    let mut known: BTreeMap<String, &str> = BTreeMap::new();
    for path in paths {
        let name = path.strip_prefix(stick::GUESTS).and_then(|rest| rest.strip_prefix('/'));
        let Some(name) = name.filter(|name| !name.is_empty() && !name.contains('/')) else {
            bail!(
                "image {path:?}: on the stick all images are in the directory guests; \
                 put the file into a directory guests beside hv.toml and write image = \"guests/NAME\""
            );
        };
        ensure!(
            stick::is_image(name),
            "image {path:?}: files whose names begin with a dot are left out"
        );
        let odd = |c: char| c.is_control() || r#""*/:<>?\|"#.contains(c);
        ensure!(
            !name.contains(odd) && !name.ends_with(['.', ' ']) && !name.starts_with(' '),
            "image {path:?}: a FAT volume cannot have such a name; give the file another one"
        );
        ensure!(name.encode_utf16().count() <= LONGEST, "image {path:?}: the name is too long");
        if let Some(other) = known.insert(name.to_lowercase(), path) {
            bail!("images {other:?} and {path:?}: a FAT volume does not tell these names apart");
        }
    }
    Ok(())
}

/// What stands in the stick's README.
fn readme() -> String {
    let text = concat!(
        "Unsplit ",
        env!("CARGO_PKG_VERSION"),
        r#"

This stick boots Unsplit, a hypervisor that tames split locks, on a PC with
an Intel CPU with VT-x, by BIOS or UEFI. It writes to no disk of the PC, and
on this stick only the log.

Boot it
  1. In the firmware's settings, turn VT-x (also "Intel Virtualization
     Technology") on and Secure Boot off.
  2. Choose the stick in the firmware's boot menu (often F12, F11, F10 or Esc).

Change what it does
  hv.toml   what runs, in a text editor: each line is explained there.
  guests/   your own images: ELF files with a PVH entry. Drop them here and
            name them in hv.toml: image = "guests/NAME".
  Eject the stick before you pull it out.

Get the log
  The log of a run stays in the PC's memory. Restart the PC without
  switching it off and boot the stick again: it is then written to
  unsplit/log.txt on this stick.

Report a problem
  Open an issue with the text of unsplit/log.txt and the model of the PC. In a
  checkout of the project, `cargo xtask report` with this stick's device or
  directory prints what to send.
"#
    );
    text.replace('\n', "\r\n")
}

/// The kernel without what only debuggers need. What the loader reads of it is as before.
fn stripped(kernel: &[u8]) -> Result<Vec<u8>> {
    let before = Kernel::parse(kernel).map_err(|why| anyhow::anyhow!("{why}"))?;
    let mut file = build::elf::Builder::read64(kernel)?;
    for section in &mut file.sections {
        let is_name_table = matches!(section.data, build::elf::SectionData::SectionString);
        section.delete = !section.is_alloc() && !is_name_table;
    }
    for symbol in &mut file.symbols {
        symbol.delete = true;
    }
    let mut small = Vec::new();
    file.write(&mut small)?;

    let after = Kernel::parse(&small).map_err(|why| anyhow::anyhow!("stripped: {why}"))?;
    let same = before.entry == after.entry
        && before.config == after.config
        && before.segments.len() == after.segments.len()
        && before.segments.iter().zip(&after.segments).all(|(before, after)| {
            (before.address, before.data, before.size, before.access)
                == (after.address, after.data, after.size, after.access)
        });
    ensure!(same, "it cannot be stripped of its debugging information");
    drop(after);
    Ok(small)
}

/// The bytes of an ELF file as they stand in memory, from [`LOAD_ADDRESS`] on, in whole sectors.
fn flatten(elf: &[u8]) -> Result<Vec<u8>> {
    let header = FileHeader64::<LittleEndian>::parse(elf)?;
    let mut flat = Vec::new();
    for program in header.program_headers(LittleEndian, elf)? {
        if program.p_type(LittleEndian) == PT_LOAD {
            let data = program.data(LittleEndian, elf).ok().context("its bytes are missing")?;
            let start = program
                .p_vaddr(LittleEndian)
                .checked_sub(LOAD_ADDRESS)
                .context("it is linked below its load address")? as usize;
            let end = start + data.len();
            ensure!(end <= 0x80000, "it is linked above conventional memory");
            flat.resize(flat.len().max(end), 0);
            flat[start..end].copy_from_slice(data);
        }
    }
    flat.resize(flat.len().next_multiple_of(SECTOR), 0);
    ensure!(flat.len() > 2 * SECTOR, "it is too small");
    ensure!(flat[SECTOR - 2..SECTOR] == [0x55, 0xaa], "it has no boot signature");
    Ok(flat)
}

/// Fills in what the boot record and the loader cannot know when they are linked.
fn complete(bios: &mut [u8], table: &Table, sectors: u64) -> Result<()> {
    let (record, rest) = bios.split_at_mut(SECTOR);
    rest[..Table::SIZE].copy_from_slice(&table.encode());
    let (words, _) = rest.as_chunks::<4>();
    let sum = words.iter().fold(0u32, |sum, word| sum.wrapping_add(u32::from_le_bytes(*word)));
    record[LOADER_SUM_OFFSET..][..4].copy_from_slice(&sum.to_le_bytes());
    record[LOADER_LBA_OFFSET..][..8].copy_from_slice(&LOADER_LBA.to_le_bytes());

    // The first entry keeps programs that know no GUID partition table off the disk. The second is
    // for BIOSes that boot no disk without an active partition; its type says that it is unused.
    // Each is: whether it is active, place of the first sector, type, place of the last one, all by
    // cylinder, head and sector; then the number of the first sector and how many there are.
    let protective = ([0, 0, 2, 0, 0xee, 0xfe, 0xff, 0xff], 1, sectors - 1);
    let active = ([0x80, 0, 1, 0, 0, 0, 1, 0], 0, 1);
    for (index, (kind, first, sectors)) in [protective, active].into_iter().enumerate() {
        let entry = &mut record[PARTITIONS_OFFSET + 16 * index..][..16];
        entry[..8].copy_from_slice(&kind);
        entry[8..12].copy_from_slice(&u32::to_le_bytes(first));
        let sectors = u32::try_from(sectors).unwrap_or(u32::MAX);
        entry[12..].copy_from_slice(&sectors.to_le_bytes());
    }
    Ok(())
}

/// Files have no date but the first that FAT knows.
#[derive(Debug)]
struct Timeless;

impl fatfs::TimeProvider for Timeless {
    fn get_current_date(&self) -> fatfs::Date {
        fatfs::Date { year: 1980, month: 1, day: 1 }
    }

    fn get_current_date_time(&self) -> fatfs::DateTime {
        let time = fatfs::Time { hour: 0, min: 0, sec: 0, millis: 0 };
        fatfs::DateTime { date: self.get_current_date(), time }
    }
}

/// A part of a device, as a device.
#[derive(Debug)]
pub struct Window<'a, D> {
    device: &'a mut D,
    start: u64,
    bytes: u64,
    at: u64,
}

impl<'a, D: Seek> Window<'a, D> {
    /// The `bytes` bytes at `start`.
    ///
    /// # Errors
    /// If the device cannot go there.
    pub fn new(device: &'a mut D, start: u64, bytes: u64) -> io::Result<Self> {
        device.seek(SeekFrom::Start(start))?;
        Ok(Self { device, start, bytes, at: 0 })
    }

    /// How much of a buffer lies in the window.
    fn within(&self, buffer: usize) -> usize {
        usize::try_from(self.bytes.saturating_sub(self.at)).map_or(buffer, |left| left.min(buffer))
    }
}

impl<D: Seek> Seek for Window<'_, D> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.bytes.checked_add_signed(by),
        };
        let at = at.ok_or(io::ErrorKind::InvalidInput)?;
        self.device.seek(SeekFrom::Start(self.start + at))?;
        self.at = at;
        Ok(at)
    }
}

impl<D: Read + Seek> Read for Window<'_, D> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let within = self.within(buffer.len());
        let read = self.device.read(&mut buffer[..within])?;
        self.at += read as u64;
        Ok(read)
    }
}

impl<D: Write + Seek> Write for Window<'_, D> {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        let within = self.within(buffer.len());
        let written = self.device.write(&buffer[..within])?;
        self.at += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.device.flush()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::io::Cursor;

    use boot::stick::{CONFIG, GUESTS, KERNEL, KERNEL_SUM, UEFI_LOADER, check_kernel};
    use gpt::GptDisk;

    use super::*;

    /// A stick without programs.
    pub struct Sample {
        content: Content,
        bytes: u64,
    }

    impl Default for Sample {
        fn default() -> Self {
            let kernel = vec![7; 5000];
            let files = BTreeMap::from([
                (UEFI_LOADER.to_owned(), b"MZ".to_vec()),
                (KERNEL_SUM.to_owned(), format!("{:016x}\n", checksum(&kernel)).into_bytes()),
                (KERNEL.to_owned(), kernel),
                (CONFIG.to_owned(), b"sld = \"warn\"\n".to_vec()),
                (README.to_owned(), readme().into_bytes()),
                ("guests/a guest with a name.elf".to_owned(), vec![1; 100_000]),
                ("guests/empty".to_owned(), Vec::new()),
            ]);
            let bios = (0..5 * SECTOR).map(|i| (i * 7) as u8).collect();
            let content = Content { bios, files };
            Self { bytes: content.smallest(), content }
        }
    }

    impl Sample {
        /// With one more file, and as large as its files need.
        fn with(path: &str, bytes: usize) -> Self {
            let mut sample = Self::default();
            sample.content.files.insert(path.to_owned(), vec![3; bytes]);
            Self { bytes: sample.content.smallest(), ..sample }
        }

        fn try_image(&self) -> Result<Vec<u8>> {
            let mut disk = Cursor::new(vec![0; self.bytes as usize]);
            self.content.write(&mut disk, self.bytes)?;
            assert_eq!(disk.get_ref().len() as u64, self.bytes);
            Ok(disk.into_inner())
        }

        /// The image's bytes.
        pub fn image(&self) -> Vec<u8> {
            self.try_image().unwrap()
        }
    }

    type Disk = Cursor<Vec<u8>>;

    fn table(disk: &mut Disk) -> GptDisk<&mut Disk> {
        gpt::GptConfig::new().only_valid_headers(true).open_from_device(disk).unwrap()
    }

    /// The volume with the files.
    fn volume(disk: &mut Disk) -> FileSystem<Window<'_, Disk>> {
        let files = table(disk).partitions()[&2].clone();
        let (start, sectors) = (files.first_lba, files.last_lba - files.first_lba + 1);
        let window = Window::new(disk, start * SECTOR as u64, sectors * SECTOR as u64).unwrap();
        FileSystem::new(window, FsOptions::new()).unwrap()
    }

    /// Puts a file onto the stick, as a loader does.
    pub fn write_file(disk: &mut Disk, path: &str, bytes: &[u8]) {
        let volume = volume(disk);
        volume.root_dir().create_file(path).unwrap().write_all(bytes).unwrap();
    }

    fn number(bytes: &[u8]) -> u64 {
        bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
    }

    #[test]
    fn both_partition_tables_name_both_partitions() {
        let sample = Sample::default();
        let mut disk = Cursor::new(sample.image());
        let sectors = sample.bytes / SECTOR as u64;
        let table = table(&mut disk);
        assert_eq!(table.backup_header().unwrap().current_lba, sectors - 1);
        assert_eq!(table.primary_header().unwrap().first_usable, LOADER_LBA);
        let found: Vec<_> = table.partitions().values().cloned().collect();
        let [loader, files] = &found[..] else { panic!("{found:?}") };
        assert_eq!((loader.first_lba, loader.last_lba), (34, 2047));
        assert_eq!(loader.part_type_guid, partition_types::BIOS);
        assert_eq!((files.first_lba, files.last_lba), (2048, sectors - 34));
        assert_eq!(files.part_type_guid, partition_types::BASIC);
        assert_eq!(files.name, "UNSPLIT");
    }

    #[test]
    fn the_boot_record_finds_the_loader_and_the_loader_the_files() {
        let sample = Sample::default();
        let image = sample.image();
        assert_eq!(number(&image[LOADER_LBA_OFFSET..][..8]), 34);
        let loader = &image[34 * SECTOR..][..4 * SECTOR];
        let sum = loader.as_chunks::<4>().0.iter().map(|word| number(word)).sum::<u64>();
        assert_eq!(number(&image[LOADER_SUM_OFFSET..][..4]), sum & 0xffff_ffff);
        let table = Table::decode(loader[..Table::SIZE].try_into().unwrap()).unwrap();
        assert_eq!(table.partition_lba, 2048);
        assert_eq!(table.partition_sectors, sample.bytes / SECTOR as u64 - 33 - 2048);
        // What the linker made is otherwise as it was.
        assert_eq!(loader[Table::SIZE..], sample.content.bios[SECTOR + Table::SIZE..]);
        assert_eq!(image[..LOADER_LBA_OFFSET], sample.content.bios[..LOADER_LBA_OFFSET]);
        // And nothing of it lies where the partition table is.
        assert_eq!(image[SECTOR..][..8], *b"EFI PART");
    }

    #[test]
    fn old_programs_see_a_disk_that_is_taken_and_active() {
        let sample = Sample::default();
        let image = sample.image();
        let entry = |index: usize| &image[PARTITIONS_OFFSET + 16 * index..][..16];
        let sectors = sample.bytes / SECTOR as u64;
        assert_eq!((entry(0)[0], entry(0)[4]), (0, 0xee));
        assert_eq!((number(&entry(0)[8..12]), number(&entry(0)[12..])), (1, sectors - 1));
        assert_eq!((entry(1)[0], entry(1)[4]), (0x80, 0));
        assert_eq!((number(&entry(1)[8..12]), number(&entry(1)[12..])), (0, 1));
        assert_eq!(*entry(2), sample.content.bios[PARTITIONS_OFFSET + 32..][..16]);
    }

    #[test]
    fn the_files_are_where_the_loaders_look() {
        let sample = Sample::default();
        let mut disk = Cursor::new(sample.image());
        let volume = volume(&mut disk);
        assert_eq!(volume.volume_label(), "UNSPLIT");
        assert_eq!(volume.read_volume_label_from_root_dir().unwrap().as_deref(), Some("UNSPLIT"));
        for (path, bytes) in &sample.content.files {
            let mut found = Vec::new();
            volume.root_dir().open_file(path).unwrap().read_to_end(&mut found).unwrap();
            assert!(found == *bytes, "{path}");
        }
        let files = &sample.content.files;
        assert_eq!(check_kernel(&files[KERNEL], &files[KERNEL_SUM]), Ok(()));
        let guests = volume.root_dir().open_dir(GUESTS).unwrap();
        let names: Vec<String> = guests.iter().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, [".", "..", "a guest with a name.elf", "empty"]);
        let flags = volume.read_status_flags().unwrap();
        assert!(!flags.dirty() && !flags.io_error());
    }

    #[test]
    fn directories_begin_with_themselves_and_what_is_above() {
        for mib in [8, 200] {
            let image = Sample { bytes: mib * MIB, ..Sample::default() }.image();
            let entries: Vec<&[u8; 32]> = image.as_chunks().0.iter().collect();
            let is = |entry: &[u8; 32], name: &str| {
                entry.starts_with(name.as_bytes()) && entry[11] == 0x10
            };
            let dots = entries.iter().enumerate().filter(|(_, entry)| is(entry, ".          "));
            let dots: Vec<usize> = dots.map(|(index, _)| index).collect();
            assert_eq!(dots.len(), 4, "{mib} MiB");
            let mut below_root = 0;
            for index in dots {
                assert_eq!(index % (SECTOR / 32), 0, "{mib} MiB");
                let above = entries[index + 1];
                assert!(is(above, "..         "), "{mib} MiB");
                let cluster = number(&above[0x1a..0x1c]) | number(&above[0x14..0x16]) << 16;
                below_root += usize::from(cluster == 0);
            }
            assert_eq!(below_root, 3, "{mib} MiB");
        }
    }

    #[test]
    fn the_same_input_makes_the_same_bytes() {
        let first = Sample::default().image();
        std::thread::sleep(std::time::Duration::from_millis(2100));
        assert!(first == Sample::default().image());
    }

    #[test]
    fn images_are_as_small_as_their_files_allow() {
        assert_eq!(Sample::default().bytes, Geometry::holding(SMALLEST).bytes());
        for mib in [6, 7, 8, 14, 15, 16, 30, 62, 63, 64] {
            let sample = Sample::with("guests/large", mib << 20);
            let spare = sample.bytes - ((mib as u64) << 20);
            assert!(spare < 4 * MIB, "{mib} MiB: {spare}");
            assert_eq!(sample.bytes % Geometry::CYLINDER, 0);
            let mut disk = Cursor::new(sample.image());
            // The log fits too.
            write_file(&mut disk, stick::LOG, &vec![b'x'; LOG_ROOM as usize]);
        }
    }

    #[test]
    fn all_sizes_have_a_fat_that_nobody_misreads() {
        use fatfs::FatType::{Fat16, Fat32};

        for (mib, kind, clusters) in [
            (8, Fat16, 6_000..40_000),
            (16, Fat16, 6_000..40_000),
            (17, Fat16, 6_000..40_000),
            (64, Fat16, 6_000..40_000),
            (65, Fat16, 6_000..41_000),
            (160, Fat16, 6_000..41_000),
            (162, Fat32, 80_000..300_000),
            (256, Fat32, 80_000..300_000),
            (512, Fat32, 80_000..300_000),
            (513, Fat32, 80_000..300_000),
        ] {
            let sample = Sample { bytes: mib * MIB, ..Sample::default() };
            let mut disk = Cursor::new(sample.image());
            let hidden = number(&disk.get_ref()[2048 * SECTOR + 0x1c..][..4]);
            assert_eq!(hidden, 2048);
            let volume = volume(&mut disk);
            assert_eq!(volume.fat_type(), kind, "{mib} MiB");
            let found = volume.stats().unwrap().total_clusters();
            assert!(clusters.contains(&found), "{mib} MiB: {found} clusters");
        }
    }

    #[test]
    fn files_that_do_not_fit_are_told_with_a_size_that_will_do() {
        let mut sample = Sample::with("guests/large", 20 << 20);
        sample.bytes = 16 * MIB;
        let refused = format!("{:#}", sample.try_image().unwrap_err());
        assert!(refused.contains("the files take 21 MiB"), "{refused}");
        let size = refused.split_once("--size ").unwrap().1.parse::<u64>().unwrap();
        sample.bytes = size * MIB;
        sample.image();
    }

    #[test]
    fn a_loader_that_is_too_large_is_refused() {
        let mut sample = Sample::default();
        sample.content.bios.resize((1 + 2048 - 34) * SECTOR, 0);
        sample.image();
        sample.content.bios.resize((2 + 2048 - 34) * SECTOR, 0);
        let refused = sample.try_image().unwrap_err().to_string();
        assert!(refused.contains("larger than its partition"), "{refused}");
    }

    #[test]
    fn names_that_fat_or_the_loader_cannot_take_are_refused() {
        check_names(["guests/a", "guests/B.elf", "guests/with blank"].into_iter()).unwrap();
        for (path, why) in [
            ("a", "directory guests"),
            ("guests", "directory guests"),
            ("guests/", "directory guests"),
            ("guests/a/b", "directory guests"),
            ("/guests/a", "directory guests"),
            ("guests/.a", "begin with a dot"),
            ("guests/a:b", "cannot have such a name"),
            ("guests/a\tb", "cannot have such a name"),
            ("guests/a.", "cannot have such a name"),
            ("guests/a ", "cannot have such a name"),
        ] {
            let refused = check_names([path].into_iter()).unwrap_err().to_string();
            assert!(refused.contains(why) && refused.contains(&format!("{path:?}")), "{refused}");
        }
        let twice = check_names(["guests/Abc", "guests/aBC"].into_iter()).unwrap_err().to_string();
        assert!(twice.contains("guests/Abc") && twice.contains("guests/aBC"), "{twice}");
        let long = format!("guests/{}", "x".repeat(256));
        assert!(check_names([&*long].into_iter()).unwrap_err().to_string().contains("too long"));
        let many: Vec<String> = (0..=stick::MAX_FILES).map(|i| format!("guests/{i}")).collect();
        assert!(check_names(many.iter().map(|path| &**path)).is_err());
    }

    #[test]
    fn the_readme_is_for_every_editor() {
        let text = readme();
        assert_eq!(text.matches('\n').count(), text.matches("\r\n").count());
        assert!(text.is_ascii() && text.lines().all(|line| line.len() <= 80), "{text}");
        assert!(text.starts_with("Unsplit "));
    }

    #[test]
    fn geometry_holds_what_it_must_and_no_cylinder_more() {
        for bytes in [1, Geometry::CYLINDER - 1, Geometry::CYLINDER, Geometry::CYLINDER + 1] {
            let size = Geometry::holding(bytes).bytes();
            assert!(size >= bytes && size - bytes < Geometry::CYLINDER);
            assert_eq!(size % Geometry::CYLINDER, 0);
        }
    }

    #[test]
    fn a_window_shows_its_part_and_nothing_else() {
        let mut device = Cursor::new((0..100u8).collect::<Vec<_>>());
        let mut window = Window::new(&mut device, 10, 20).unwrap();
        let mut bytes = Vec::new();
        window.read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes, (10..30).collect::<Vec<u8>>());
        assert_eq!(window.seek(SeekFrom::End(-2)).unwrap(), 18);
        assert!(window.write_all(&[0; 3]).is_err());
        assert!(window.seek(SeekFrom::Current(-30)).is_err());
        assert_eq!(device.get_ref()[27..32], [27, 0, 0, 30, 31]);
    }

    #[test]
    fn what_is_no_loader_is_refused() {
        assert!(flatten(b"not an ELF file").is_err());
        let ourselves = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(flatten(&ourselves).is_err());
    }

    #[test]
    fn a_kernel_that_the_loader_would_refuse_is_refused() {
        let ourselves = fs::read(std::env::current_exe().unwrap()).unwrap();
        let refused = stripped(&ourselves).unwrap_err().to_string();
        assert!(refused.contains("bootloader_api"), "{refused}");
    }

    #[test]
    fn failure_leaves_no_image_and_devices_are_left_to_flash() {
        let ourselves = std::env::current_exe().unwrap();
        let out = std::env::temp_dir().join(format!("image-test-{}", std::process::id()));
        let spec = |out| ImageSpec {
            bios: &ourselves,
            uefi: &ourselves,
            kernel: &ourselves,
            config: "",
            guests: &[],
            size: Size::Smallest,
            out,
        };
        let refused = format!("{:#}", write(&spec(&out)).unwrap_err());
        assert!(refused.contains(&ourselves.display().to_string()), "{refused}");
        assert!(!out.exists());
    }
}
