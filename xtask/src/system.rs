//! The hypervisor as a bootable disk.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::{fs, process};

use anyhow::{Context, Result};

use crate::config::{Setup, Source};
use crate::image::{self, ImageSpec, Size};
use crate::{bare, links, target_directory};

/// Everything that runs on the bare machine, built.
#[derive(Clone, Debug)]
pub struct System {
    bios: PathBuf,
    uefi: PathBuf,
    kernel: PathBuf,
    guests: Vec<(String, PathBuf)>,
}

impl System {
    /// Builds the loaders, the kernel and the test guests.
    ///
    /// # Errors
    /// If cargo fails.
    pub fn build() -> Result<Self> {
        Ok(Self {
            bios: bare::boot()?,
            uefi: bare::uefi()?,
            kernel: bare::kernel()?,
            guests: bare::guests()?,
        })
    }

    /// Checks that nothing in it is writable and executable, and that its code survives interrupts.
    ///
    /// # Errors
    /// What is wrong, and where.
    pub fn check(&self) -> Result<()> {
        links::check_bios_stage(&self.bios)?;
        links::check_uefi_stage(&self.uefi)?;
        links::check_kernel(&self.kernel)?;
        self.guests.iter().try_for_each(|(_, file)| links::check_guest(file))
    }

    /// ELF file of the BIOS stage.
    pub fn bios(&self) -> &Path {
        &self.bios
    }

    /// ELF file of the UEFI loader.
    pub fn uefi(&self) -> &Path {
        &self.uefi
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

    /// The file of a guest's image.
    ///
    /// # Errors
    /// If it is a test guest that was not built.
    pub fn image<'a>(&'a self, source: &'a Source) -> Result<&'a Path> {
        match source {
            Source::Registered(name) => self.guest(name),
            Source::File(file) => Ok(file),
        }
    }

    /// Writes a disk that boots the hypervisor with this configuration, as small as it can be.
    ///
    /// # Errors
    /// As for [`stick`](Self::stick).
    pub fn disk(&self, setup: &Setup, out: &Path) -> Result<()> {
        self.stick(setup, Size::Smallest, out)
    }

    /// The same, of any size.
    ///
    /// # Errors
    /// If an image is missing or cannot be on it, or the disk cannot be written.
    pub fn stick(&self, setup: &Setup, size: Size, out: &Path) -> Result<()> {
        let files = setup
            .images
            .iter()
            .map(|(path, source)| Ok((path.clone(), self.image(source)?.to_owned())));
        image::write(&ImageSpec {
            bios: &self.bios,
            uefi: &self.uefi,
            kernel: &self.kernel,
            config: &setup.config,
            guests: &files.collect::<Result<Vec<_>>>()?,
            size,
            out,
        })
    }

    /// A disk as [`disk`](Self::disk) writes it, for one run.
    ///
    /// # Errors
    /// As there.
    pub fn temporary_disk(&self, setup: &Setup) -> Result<TemporaryDisk> {
        let disk = TemporaryDisk::new();
        self.disk(setup, disk.path())?;
        Ok(disk)
    }
}

/// A disk image that is removed when dropped.
#[derive(Debug)]
pub struct TemporaryDisk(PathBuf);

impl TemporaryDisk {
    /// A place for one, in which nothing is yet.
    pub(crate) fn new() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let name = format!("disk-{}-{number}.img", process::id());
        Self(target_directory().join(name))
    }

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
