//! The stick from a person's side: making one, and reading back the log that a run left on it.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{self, Read, Seek, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use boot::disk::SECTOR;
use boot::stick::{KERNEL, LOG};
use clap::Args;
use fatfs::{FileSystem, FsOptions};

use crate::image::{self, README, SIZES, Size, Window};
use crate::run::SetupArgs;
use crate::system::System;

/// What is on a stick, and how large its image is.
#[derive(Args, Debug)]
pub struct StickArgs {
    #[command(flatten)]
    setup: SetupArgs,
    /// Size of the image in MiB.
    #[arg(long, default_value_t = 256, value_name = "MIB", value_parser = clap::value_parser!(u32).range(SIZES))]
    size: u32,
}

impl StickArgs {
    /// Builds everything and writes the image.
    ///
    /// # Errors
    /// If the setup cannot be used or the image cannot be written.
    pub fn write(&self, out: &Path) -> Result<()> {
        // Before anything is built: what a person got wrong is told at once.
        let setup = self.setup.stick_setup()?;
        let system = System::build()?;
        system.check()?;
        system.stick(&setup, Size::Mib(self.size), out)
    }
}

/// `cargo xtask image`
///
/// # Errors
/// As for [`StickArgs::write`].
pub fn image(args: &StickArgs, out: &Path) -> Result<()> {
    args.write(out)?;
    println!(
        "{out} is written. It boots by BIOS and UEFI.\n\
         To a USB stick, which is erased: cargo xtask flash --image {out} /dev/sdX\n\
         On the stick, hv.toml says what runs and guests/ has the images: edit and add as you like.",
        out = out.display()
    );
    Ok(())
}

/// Arguments of `report`.
#[derive(Args, Debug)]
pub struct ReportArgs {
    /// The stick: its device, the directory where it is mounted, or an image file.
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// Write the report here instead of printing it.
    #[arg(long, value_name = "FILE")]
    out: Option<PathBuf>,
}

/// `cargo xtask report`
///
/// # Errors
/// If this is no stick, or it has no log yet; the messages say what to do.
pub fn report(args: &ReportArgs) -> Result<()> {
    let report = report_of(&args.path)?;
    match &args.out {
        None => print!("{report}"),
        Some(out) => {
            fs::write(out, &report).with_context(|| format!("cannot write {}", out.display()))?;
            println!("{} is written: open an issue with its text", out.display());
        }
    }
    Ok(())
}

/// The report of a stick: its device, the directory where it is mounted, or an image file.
///
/// # Errors
/// As for [`report`].
pub fn report_of(path: &Path) -> Result<String> {
    Left::read(path)?.report(path)
}

/// What a stick has for a report.
#[derive(Debug, PartialEq, Eq)]
struct Left {
    /// First line of what it says about itself.
    version: Option<String>,
    log: Option<String>,
}

impl Left {
    fn read(path: &Path) -> Result<Self> {
        let shown = path.display();
        let kind = fs::metadata(path).with_context(|| format!("cannot read {shown}"))?;
        if kind.is_dir() {
            return Self::of(|file| match fs::read(path.join(file)) {
                Ok(bytes) => Ok(Some(bytes)),
                Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(why) => Err(why).with_context(|| format!("cannot read {file}")),
            })
            .with_context(|| format!("{shown}"));
        }
        let mut device = File::open(path).with_context(|| match fs::metadata(path) {
            Ok(there) if !there.is_file() => format!(
                "cannot read {shown}: either mount the stick and give its directory, or use sudo"
            ),
            _ => format!("cannot read {shown}"),
        })?;
        Self::of_device(&mut device).with_context(|| format!("{shown}"))
    }

    /// Of a whole disk, or of the partition with the files.
    fn of_device<D: Read + Write + Seek + std::fmt::Debug>(device: &mut D) -> Result<Self> {
        let end = device.seek(io::SeekFrom::End(0))?;
        let (start, bytes) = match gpt::GptConfig::new().open_from_device(&mut *device) {
            Ok(table) => {
                let mut partitions = table.partitions().values();
                let files = partitions.find(|partition| partition.name == image::LABEL);
                let files = files.context(NOT_A_STICK)?;
                ensure!(files.first_lba <= files.last_lba, NOT_A_STICK);
                let sectors = files.last_lba - files.first_lba + 1;
                (files.first_lba * SECTOR as u64, sectors * SECTOR as u64)
            }
            Err(_) => (0, end),
        };
        let window = Window::new(device, start, bytes)?;
        let Ok(volume) = FileSystem::new(window, FsOptions::new()) else { bail!(NOT_A_STICK) };
        let root = volume.root_dir();
        Self::of(|path| {
            let mut bytes = Vec::new();
            match root.open_file(path) {
                Ok(mut file) => {
                    file.read_to_end(&mut bytes).with_context(|| format!("cannot read {path}"))?;
                    Ok(Some(bytes))
                }
                Err(why) if why.kind() == io::ErrorKind::NotFound => Ok(None),
                Err(why) => Err(why).with_context(|| format!("cannot read {path}")),
            }
        })
    }

    fn of(read: impl Fn(&str) -> Result<Option<Vec<u8>>>) -> Result<Self> {
        let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
        ensure!(read(KERNEL)?.is_some(), NOT_A_STICK);
        let readme = read(README)?.map(text);
        let version = readme.as_deref().and_then(|text| text.lines().next()).map(str::to_owned);
        Ok(Self { version, log: read(LOG)?.map(text).filter(|log| !log.trim().is_empty()) })
    }

    fn report(&self, path: &Path) -> Result<String> {
        let Some(log) = &self.log else {
            bail!(
                "{}: there is no log on the stick yet.\n\
                 The log of a run stays in the machine's memory. Restart the machine without switching it off\n\
                 (a key at the end of the run does that, or Ctrl-Alt-Del, or the reset button) and boot the stick\n\
                 again: it then writes {LOG}. Eject the stick before you pull it out.",
                path.display()
            );
        };
        let here = concat!("Unsplit ", env!("CARGO_PKG_VERSION"));
        let mut report = String::from("=== Unsplit: the log of the last run ===\n");
        // Writing to a string does not fail.
        let _ = match self.version.as_deref() {
            Some(there) if there == here => writeln!(report, "stick and this checkout: {here}"),
            Some(there) => writeln!(report, "stick: {there}; this checkout: {here}"),
            None => writeln!(report, "stick: of an unknown version; this checkout: {here}"),
        };
        report.push_str(
            "To report a problem, open an issue with all of this text, and say which machine it was: maker,\n\
             model, CPU, firmware version, BIOS or UEFI.\n\n",
        );
        for line in log.lines() {
            report.push_str(line.trim_end_matches('\r'));
            report.push('\n');
        }
        Ok(report)
    }
}

const NOT_A_STICK: &str = "this is no stick of Unsplit's: give the stick's device, the directory where it is \
     mounted, or an image that cargo xtask image wrote";

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use super::*;
    use crate::image::tests::{Sample, write_file};

    fn left(log: Option<&str>) -> Left {
        Left { version: Some("Unsplit 0.0.1".to_owned()), log: log.map(str::to_owned) }
    }

    #[test]
    fn a_log_is_read_from_an_image_and_from_its_partition() {
        let mut disk = Cursor::new(Sample::default().image());
        let without = Left::of_device(&mut disk).unwrap();
        let version = concat!("Unsplit ", env!("CARGO_PKG_VERSION")).to_owned();
        assert_eq!(without, Left { version: Some(version), log: None });

        write_file(&mut disk, LOG, b"first\r\nsecond\n");
        let with = Left::of_device(&mut disk).unwrap();
        assert_eq!(with.log.as_deref(), Some("first\r\nsecond\n"));
        let partition = disk.get_ref()[2048 * SECTOR..].to_vec();
        assert_eq!(Left::of_device(&mut Cursor::new(partition)).unwrap(), with);
    }

    #[test]
    fn a_log_is_read_from_a_directory() {
        let directory = std::env::temp_dir().join(format!("unsplit-report-{}", std::process::id()));
        fs::create_dir_all(directory.join("unsplit")).unwrap();
        let other = Left::read(&directory);
        fs::write(directory.join(KERNEL), "").unwrap();
        let without = Left::read(&directory);
        fs::write(directory.join(LOG), "text\n").unwrap();
        let with = Left::read(&directory);
        fs::remove_dir_all(&directory).unwrap();

        assert!(format!("{:#}", other.unwrap_err()).contains("no stick"));
        assert_eq!(without.unwrap(), Left { version: None, log: None });
        assert_eq!(with.unwrap().log.as_deref(), Some("text\n"));
    }

    #[test]
    fn what_is_no_stick_is_told_so() {
        for size in [0, 512, 1 << 20] {
            let refused = Left::of_device(&mut Cursor::new(vec![0; size])).unwrap_err();
            assert!(refused.to_string().contains("no stick"), "{size}: {refused:#}");
        }
        let missing = Left::read(Path::new("/nonexistent/stick")).unwrap_err();
        assert!(missing.to_string().contains("/nonexistent/stick"));
    }

    #[test]
    fn without_a_log_it_is_said_how_to_get_one() {
        for log in [None, Some("")] {
            let left = left(log.filter(|log| !log.is_empty()));
            let refused = left.report(Path::new("/dev/sdx")).unwrap_err().to_string();
            assert!(
                refused.contains("/dev/sdx") && refused.contains("boot the stick"),
                "{refused}"
            );
        }
    }

    #[test]
    fn a_report_names_both_versions_and_ends_with_the_log() {
        let report = left(Some("one\r\ntwo")).report(Path::new("x")).unwrap();
        assert!(report.contains("stick: Unsplit 0.0.1; this checkout: Unsplit "), "{report}");
        assert!(report.contains("open an issue"), "{report}");
        assert!(report.ends_with("\n\none\ntwo\n"), "{report}");
    }
}
