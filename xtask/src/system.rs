//! The hypervisor as a bootable disk.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::bare;
use crate::config::{Setup, Source};
use crate::image::{self, ImageSpec};

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
}
