//! The kernel and its modules, made ready from Debian's package.

use std::fs;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use lzma_rust2::XzReader;

/// Offsets in a `bzImage` (Documentation/arch/x86/boot.rst): number of setup sectors, payload.
const SETUP_SECTORS: usize = 0x1f1;
const PAYLOAD_OFFSET: usize = 0x248;
const PAYLOAD_LENGTH: usize = 0x24c;
/// How an XZ stream begins.
const XZ: &[u8] = b"\xfd7zXZ\0";

/// The ELF file in a `bzImage`.
///
/// # Errors
/// If it is no `bzImage`, or not compressed by XZ.
pub fn vmlinux(image: &[u8]) -> Result<Vec<u8>> {
    let number = |at: usize| {
        let bytes = image.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
        bytes.map(|bytes| u32::from_le_bytes(bytes) as usize).context("the kernel is cut off")
    };
    let setup = (number(SETUP_SECTORS)? & 0xff) + 1;
    let start = setup * 512 + number(PAYLOAD_OFFSET)?;
    let payload = image.get(start..start + number(PAYLOAD_LENGTH)?);
    let payload = payload.context("the kernel is cut off")?;
    ensure!(payload.starts_with(XZ), "the kernel is not compressed by XZ");
    let mut elf = Vec::new();
    // Behind the stream stands its uncompressed length.
    XzReader::new(payload, false).read_to_end(&mut elf).context("cannot decompress the kernel")?;
    Ok(elf)
}

/// The same, decompressed once and then kept beside it.
///
/// # Errors
/// As [`vmlinux`], or if it cannot be stored.
pub fn vmlinux_beside(path: &Path, image: &[u8]) -> Result<Vec<u8>> {
    let kept = path.with_file_name("vmlinux");
    if let Ok(elf) = fs::read(&kept) {
        return Ok(elf);
    }
    let elf = vmlinux(image)?;
    // Another process may do the same: what has the final name is whole.
    let unfinished = kept.with_extension(std::process::id().to_string());
    fs::write(&unfinished, &elf).with_context(|| format!("cannot write {}", kept.display()))?;
    fs::rename(&unfinished, &kept)?;
    Ok(elf)
}

/// A module without the signature that Debian has put behind it. To verify it would take half a billion
/// instructions; nothing here asks for it.
pub fn unsigned(mut module: Vec<u8>) -> Vec<u8> {
    /// `MODULE_SIG_STRING` and `struct module_signature` in `include/linux/module_signature.h`.
    const MARK: &[u8] = b"~Module signature appended~\n";
    const DESCRIPTION: usize = 12;
    let Some(rest) = module.strip_suffix(MARK) else { return module };
    let Some((rest, length)) = rest.split_last_chunk::<4>() else { return module };
    let behind = u32::from_be_bytes(*length) as usize + DESCRIPTION - length.len();
    if let Some(end) = rest.len().checked_sub(behind) {
        module.truncate(end);
    }
    module
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signatures_are_cut_off() {
        let signed =
            [&b"ELF..."[..], b"SIGN", &[0; 8], &[0, 0, 0, 4], b"~Module signature appended~\n"];
        assert_eq!(unsigned(signed.concat()), b"ELF...");
        assert_eq!(unsigned(b"ELF...".to_vec()), b"ELF...");
        // A length that cannot be.
        let odd = [&[0xff; 4][..], b"~Module signature appended~\n"].concat();
        assert_eq!(unsigned(odd.clone()), odd);
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        assert!(vmlinux(b"MZ").is_err());
        let refused = vmlinux(&[0; 4096]).unwrap_err().to_string();
        assert!(refused.contains("XZ"), "{refused}");
    }
}
