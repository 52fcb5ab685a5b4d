//! The hypervisor as a bootable disk.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, process};

use anyhow::{Context, Result};

use crate::config::{Setup, Source};
use crate::image::{self, ImageSpec};
use crate::{bare, target_directory};

/// Everything that runs on the bare machine, built.
#[derive(Clone, Debug)]
pub struct System {
    boot: PathBuf,
    kernel: PathBuf,
    guests: Vec<(String, PathBuf)>,
}

impl System {
    /// Builds the loader, the kernel and the test guests.
    ///
    /// # Errors
    /// If cargo fails.
    pub fn build() -> Result<Self> {
        Ok(Self { boot: bare::boot()?, kernel: bare::kernel()?, guests: bare::guests()? })
    }

    /// The kernel's ELF file.
    pub fn kernel(&self) -> &Path {
        &self.kernel
    }

    /// ELF file of a test guest.
    ///
    /// # Errors
    /// If there is none of that name.
    pub fn guest(&self, name: &str) -> Result<&Path> {
        let built = self.guests.iter().find(|(built, _)| built == name);
        built.map(|(_, file)| &**file).with_context(|| format!("no guest {name:?} was built"))
    }

    /// Writes a disk that boots the hypervisor with this configuration.
    ///
    /// # Errors
    /// If an image is missing or the disk cannot be written.
    pub fn disk(&self, setup: &Setup, out: &Path) -> Result<()> {
        let files = setup.images.iter().map(|(path, source)| {
            let file = match source {
                Source::Registered(name) => self.guest(name)?,
                Source::File(file) => file,
            };
            Ok((path.clone(), file.to_owned()))
        });
        let ramdisk = image::ramdisk(&setup.config, &files.collect::<Result<Vec<_>>>()?)?;
        let spec = ImageSpec { boot: &self.boot, kernel: &self.kernel, ramdisk: &ramdisk, out };
        image::build_bios(&spec)?;
        Ok(())
    }

    /// A disk as [`disk`](Self::disk) writes it, for one run.
    ///
    /// # Errors
    /// As there.
    pub fn temporary_disk(&self, setup: &Setup) -> Result<TemporaryDisk> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("disk-{}-{number}.img", process::id());
        let disk = TemporaryDisk(target_directory().join(name));
        self.disk(setup, &disk.0)?;
        Ok(disk)
    }
}

/// A disk image that is removed when dropped.
#[derive(Debug)]
pub struct TemporaryDisk(PathBuf);

impl TemporaryDisk {
    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TemporaryDisk {
    fn drop(&mut self) {
        // It was perhaps never made; a leftover in the target directory does no harm.
        let _ = fs::remove_file(&self.0);
    }
}
