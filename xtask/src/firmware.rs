//! Firmware of the machines: a BIOS, which comes with each emulator, or UEFI, which does not.

use std::fmt::{self, Display};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use clap::ValueEnum;

use crate::cache;

/// What starts the machine.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Firmware {
    /// A BIOS.
    #[default]
    Bios,
    /// UEFI.
    Uefi,
}

/// UEFI firmware for virtual machines (OVMF): its code, and its variables as they leave the factory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uefi {
    /// The code, which no machine writes to.
    pub code: PathBuf,
    /// The variables, of which each machine has a copy.
    pub variables: PathBuf,
}

impl Display for Uefi {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.code.display().fmt(f)
    }
}

/// Where distributions put it, without Secure Boot.
const PLACES: [[&str; 2]; 8] = [
    // Debian, Ubuntu
    ["usr/share/OVMF/OVMF_CODE_4M.fd", "usr/share/OVMF/OVMF_VARS_4M.fd"],
    ["usr/share/OVMF/OVMF_CODE.fd", "usr/share/OVMF/OVMF_VARS.fd"],
    // Arch
    ["usr/share/edk2/x64/OVMF_CODE.4m.fd", "usr/share/edk2/x64/OVMF_VARS.4m.fd"],
    // Fedora
    ["usr/share/edk2/ovmf/OVMF_CODE.fd", "usr/share/edk2/ovmf/OVMF_VARS.fd"],
    // openSUSE
    ["usr/share/qemu/ovmf-x86_64-4m-code.bin", "usr/share/qemu/ovmf-x86_64-4m-vars.bin"],
    ["usr/share/qemu/ovmf-x86_64-code.bin", "usr/share/qemu/ovmf-x86_64-vars.bin"],
    // QEMU's own. The variables are the same for 32 and 64 bits.
    ["usr/share/qemu/edk2-x86_64-code.fd", "usr/share/qemu/edk2-i386-vars.fd"],
    ["usr/local/share/qemu/edk2-x86_64-code.fd", "usr/local/share/qemu/edk2-i386-vars.fd"],
];

/// How to get it.
pub const INSTALL: &str =
    "install OVMF with your package manager (Debian, Ubuntu: apt-get install ovmf)";

impl Uefi {
    /// What the host has.
    pub fn on_host() -> Option<Self> {
        Self::below(Path::new("/"))
    }

    /// What the cache has.
    pub fn in_cache() -> Option<Self> {
        Self::below(cache::existing()?.path())
    }

    fn below(root: &Path) -> Option<Self> {
        let places = PLACES.iter().map(|[code, variables]| Self {
            code: root.join(code),
            variables: root.join(variables),
        });
        places.into_iter().find(|uefi| uefi.code.is_file() && uefi.variables.is_file())
    }

    /// The host's if that is wanted, else the cached one, which is fetched if need be.
    ///
    /// # Errors
    /// If there is none and none can be fetched.
    pub fn ensure(of_host: bool) -> Result<Self> {
        let host = if of_host { Self::on_host() } else { None };
        if let Some(found) = host.or_else(Self::in_cache) {
            return Ok(found);
        }
        let root =
            cache::ensure().with_context(|| format!("there is no UEFI firmware; {INSTALL}, or"))?;
        Self::below(root.path()).ok_or_else(|| {
            anyhow!("{} has no UEFI firmware: remove it and try again", root.path().display())
        })
    }

    /// Makes one ROM for the top of the first 4 GiB, variables first; its address.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn write_rom(&self, rom: &Path) -> Result<u64> {
        let read =
            |path: &Path| fs::read(path).with_context(|| format!("cannot read {}", path.display()));
        let mut bytes = read(&self.variables)?;
        bytes.extend(read(&self.code)?);
        fs::write(rom, &bytes).with_context(|| format!("cannot write {}", rom.display()))?;
        Ok((1 << 32) - bytes.len() as u64)
    }
}

/// Takes the control sequences out of what UEFI firmware writes to a serial port: clearing the screen,
/// colours, places.
#[derive(Debug, Default)]
pub struct Plain(Inside);

/// What the next byte belongs to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Inside {
    #[default]
    Text,
    /// Behind an escape character.
    Escape,
    /// Behind that and `[`: until a byte of `@` to `~`.
    Sequence,
}

impl Plain {
    /// The text in the next bytes.
    pub fn take(&mut self, bytes: &[u8]) -> Vec<u8> {
        const ESCAPE: u8 = 0x1b;
        let mut text = Vec::with_capacity(bytes.len());
        for byte in bytes {
            self.0 = match (self.0, byte) {
                (_, &ESCAPE) => Inside::Escape,
                (Inside::Escape, b'[') => Inside::Sequence,
                (Inside::Escape, _) | (Inside::Sequence, 0x40..=0x7e) => Inside::Text,
                (Inside::Sequence, _) => Inside::Sequence,
                (Inside::Text, byte) => {
                    text.push(*byte);
                    Inside::Text
                }
            };
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_sequences_are_taken_out_wherever_they_are_cut() {
        let bytes = b"\x1b[2J\x1b[001;001H\x1b[=3hone\r\n\x1b[0m\x1b[37m\x1b[40mtwo\x1b7 [3m";
        for cut in 0..bytes.len() {
            let mut plain = Plain::default();
            let text = [plain.take(&bytes[..cut]), plain.take(&bytes[cut..])].concat();
            assert_eq!(text, b"one\r\ntwo [3m", "cut at {cut}");
        }
    }

    /// A directory that is removed when dropped.
    struct Root(PathBuf);

    impl Root {
        fn with(name: &str, files: &[(&str, &[u8])]) -> Self {
            let root = std::env::temp_dir().join(format!("unsplit-{name}-{}", std::process::id()));
            for (file, bytes) in files {
                let file = root.join(file);
                fs::create_dir_all(file.parent().unwrap()).unwrap();
                fs::write(file, bytes).unwrap();
            }
            Self(root)
        }
    }

    impl Drop for Root {
        fn drop(&mut self) {
            let _ = fs::remove_dir_all(&self.0);
        }
    }

    #[test]
    fn firmware_without_variables_is_passed_over() {
        let arch = "usr/share/edk2/x64";
        let root = Root::with(
            "firmware-places",
            &[
                ("usr/share/OVMF/OVMF_CODE.fd", b"code"),
                (&format!("{arch}/OVMF_CODE.4m.fd"), b"code"),
                (&format!("{arch}/OVMF_VARS.4m.fd"), b"vars"),
            ],
        );
        let found = Uefi::below(&root.0).unwrap();
        assert_eq!(found.code, root.0.join(arch).join("OVMF_CODE.4m.fd"));
        fs::remove_file(&found.variables).unwrap();
        assert_eq!(Uefi::below(&root.0), None);
    }

    #[test]
    fn the_rom_ends_at_4_gib_with_the_code() {
        let [code, variables] = PLACES[0];
        let root = Root::with("firmware-rom", &[(code, &[2; 0x1800]), (variables, &[1; 0x800])]);
        let rom = root.0.join("rom");
        let uefi = Uefi::below(&root.0).unwrap();
        assert_eq!(uefi.write_rom(&rom).unwrap(), 0xffff_e000);
        assert_eq!(fs::read(&rom).unwrap(), [[1; 0x800].as_slice(), &[2; 0x1800]].concat());
    }
}
