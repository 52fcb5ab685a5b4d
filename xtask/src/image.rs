//! What the hypervisor boots from: the ramdisk and the disk image.

use std::{
    fs::{self, File},
    io::{Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use boot::{
    disk::{Extent, LOADER_SUM_OFFSET, SECTOR, Table, checksum},
    kernel::Kernel,
};
use object::{
    LittleEndian,
    elf::{FileHeader64, PT_LOAD},
    read::elf::{FileHeader, ProgramHeader},
};

/// Where the BIOS puts the boot record, and the lowest address of the linked loader.
const LOAD_ADDRESS: u64 = 0x7c00;

/// Offset of the partition table in the boot record.
const PARTITIONS_OFFSET: usize = 0x1be;

/// Type of the only partition: data without a file system.
const PARTITION_TYPE: u8 = 0xda;

/// Parts of a disk image.
pub struct ImageSpec<'a> {
    /// The linked BIOS stage, an ELF file.
    pub boot: &'a Path,
    /// The kernel, an ELF file.
    pub kernel: &'a Path,
    /// The ramdisk's bytes; if there are none, the kernel gets no ramdisk.
    pub ramdisk: &'a [u8],
    /// The image to be written.
    pub out: &'a Path,
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

/// Writes a disk image that a BIOS boots. The kernel is checked as the loader will check it, which
/// includes that nothing in it is both writable and executable.
pub fn build_bios(spec: &ImageSpec<'_>) -> Result<Geometry> {
    let read = |path: &Path| fs::read(path).with_context(|| format!("cannot read {path:?}"));
    let kernel = read(spec.kernel)?;
    if let Err(why) = Kernel::parse(&kernel) {
        bail!("{}: {why}", spec.kernel.display());
    }
    let mut loader = flatten(&read(spec.boot)?)
        .with_context(|| format!("{} is not a BIOS stage", spec.boot.display()))?;

    let extent = |lba: usize, bytes: &[u8]| Extent {
        lba: lba as u64,
        bytes: bytes.len() as u64,
        checksum: checksum(bytes),
    };
    let kernel_at = extent(loader.len() / SECTOR, &kernel);
    let ramdisk_at = extent(kernel_at.end() as usize, spec.ramdisk);
    let geometry = Geometry::holding(ramdisk_at.end() * SECTOR as u64);
    let table = Table { kernel: kernel_at, ramdisk: ramdisk_at };
    complete(&mut loader, &table, geometry)?;

    let write = || {
        let mut out = File::create(spec.out)?;
        out.write_all(&loader)?;
        for (at, bytes) in [(kernel_at, &kernel[..]), (ramdisk_at, spec.ramdisk)] {
            out.seek(SeekFrom::Start(at.lba * SECTOR as u64))?;
            out.write_all(bytes)?;
        }
        out.set_len(geometry.bytes())
    };
    write().with_context(|| format!("cannot write {:?}", spec.out))?;
    Ok(geometry)
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
fn complete(loader: &mut [u8], table: &Table, geometry: Geometry) -> Result<()> {
    let (record, rest) = loader.split_at_mut(SECTOR);
    rest[..Table::SIZE].copy_from_slice(&table.encode());
    let (words, _) = rest.as_chunks::<4>();
    let sum = words.iter().fold(0u32, |sum, word| sum.wrapping_add(u32::from_le_bytes(*word)));
    record[LOADER_SUM_OFFSET..LOADER_SUM_OFFSET + 4].copy_from_slice(&sum.to_le_bytes());

    // One active partition, as some BIOSes boot no disk without. It is addressed by block; the
    // addresses by cylinder, head and sector say "beyond what can be expressed".
    let sectors = u32::try_from(geometry.bytes() / SECTOR as u64 - 1)
        .context("the image is too large for a partition table")?;
    let partition = &mut record[PARTITIONS_OFFSET..PARTITIONS_OFFSET + 16];
    partition[..8].copy_from_slice(&[0x80, 0xfe, 0xff, 0xff, PARTITION_TYPE, 0xfe, 0xff, 0xff]);
    partition[8..12].copy_from_slice(&1u32.to_le_bytes());
    partition[12..].copy_from_slice(&sectors.to_le_bytes());
    Ok(())
}

/// A tar archive (ustar) of `hv.toml` with the text `config_toml` and of `files`, each given by its
/// name in the archive and its path on the host. The same input makes the same bytes.
pub fn ramdisk(config_toml: &str, files: &[(String, PathBuf)]) -> Result<Vec<u8>> {
    let mut archive = tar::Builder::new(Vec::new());
    let mut append = |name: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        archive
            .append_data(&mut header, name, bytes)
            .with_context(|| format!("cannot put {name} into the ramdisk"))
    };
    append("hv.toml", config_toml.as_bytes())?;
    for (name, path) in files {
        let bytes = fs::read(path).with_context(|| format!("cannot read {path:?}"))?;
        append(name, &bytes)?;
    }
    Ok(archive.into_inner()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A loader with some code, cut to whole sectors.
    fn loader() -> Vec<u8> {
        (0..4 * SECTOR).map(|i| (i * 7) as u8).collect()
    }

    const TABLE: Table = Table {
        kernel: Extent { lba: 4, bytes: 1000, checksum: 1 },
        ramdisk: Extent { lba: 6, bytes: 0, checksum: 2 },
    };

    #[test]
    fn the_sum_is_that_of_all_sectors_after_the_boot_record() {
        let mut image = loader();
        complete(&mut image, &TABLE, Geometry { cylinders: 3 }).unwrap();
        let (words, _) = image[SECTOR..].as_chunks::<4>();
        let sum = words.iter().map(|w| u64::from(u32::from_le_bytes(*w))).sum::<u64>();
        assert_eq!(image[LOADER_SUM_OFFSET..][..4], (sum as u32).to_le_bytes());
        let table = image[SECTOR..][..Table::SIZE].try_into().unwrap();
        assert_eq!(Table::decode(table), Some(TABLE));
    }

    #[test]
    fn the_partition_covers_the_disk() {
        let mut image = loader();
        let geometry = Geometry { cylinders: 3 };
        complete(&mut image, &TABLE, geometry).unwrap();
        let entry = &image[PARTITIONS_OFFSET..][..16];
        assert_eq!(entry[0], 0x80);
        let number = |at: usize| u32::from_le_bytes(entry[at..at + 4].try_into().unwrap());
        assert_eq!(u64::from(number(8) + number(12)) * SECTOR as u64, geometry.bytes());
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
    fn what_is_no_loader_is_refused() {
        assert!(flatten(b"not an ELF file").is_err());
        let ourselves = fs::read(std::env::current_exe().unwrap()).unwrap();
        assert!(flatten(&ourselves).is_err());
    }

    #[test]
    fn a_kernel_that_the_loader_would_refuse_makes_no_image() {
        let ourselves = std::env::current_exe().unwrap();
        let out = std::env::temp_dir().join(format!("image-test-{}", std::process::id()));
        let spec = ImageSpec { boot: &ourselves, kernel: &ourselves, ramdisk: &[], out: &out };
        let refused = build_bios(&spec).unwrap_err().to_string();
        assert!(refused.contains(&ourselves.display().to_string()), "{refused}");
        assert!(refused.contains("bootloader_api"), "{refused}");
        assert!(!out.exists());
    }

    #[test]
    fn ramdisks_are_ustar_and_do_not_depend_on_when_they_are_made() {
        let dir = std::env::temp_dir().join(format!("ramdisk-test-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let path = dir.join("guest");
        let make = |stamp: u64| {
            fs::write(&path, b"guest's bytes").unwrap();
            let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(stamp);
            File::options().write(true).open(&path).unwrap().set_modified(time).unwrap();
            ramdisk("sld = \"warn\"\n", &[("guests/guest".into(), path.clone())]).unwrap()
        };
        let first = make(1_000_000);
        assert_eq!(first, make(2_000_000));
        fs::remove_dir_all(&dir).unwrap();

        assert_eq!(first.len() % SECTOR, 0);
        assert_eq!(&first[257..263], b"ustar\0");
        let mut found = Vec::new();
        for entry in tar::Archive::new(&first[..]).entries().unwrap() {
            let mut entry = entry.unwrap();
            let mut bytes = Vec::new();
            std::io::Read::read_to_end(&mut entry, &mut bytes).unwrap();
            found.push((entry.path().unwrap().display().to_string(), bytes));
        }
        let expected =
            [("hv.toml", &b"sld = \"warn\"\n"[..]), ("guests/guest", &b"guest's bytes"[..])]
                .map(|(name, bytes)| (name.to_owned(), bytes.to_vec()));
        assert_eq!(found, expected);
    }

    #[test]
    fn a_missing_file_is_named() {
        let missing = ramdisk("", &[("guests/x".into(), "/nonexistent/guest-x".into())]);
        assert!(format!("{:#}", missing.unwrap_err()).contains("/nonexistent/guest-x"));
    }
}
