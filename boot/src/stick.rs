//! The files of the stick: where they are, and which of them the kernel gets.

use core::fmt;

use crate::disk::checksum;

/// The kernel, an ELF file.
pub const KERNEL: &str = "unsplit/kernel.elf";

/// The [`crate::disk::checksum`] of the kernel, in 16 hexadecimal digits.
pub const KERNEL_SUM: &str = "unsplit/kernel.sum";

/// The log of the last run, written by the loader.
pub const LOG: &str = "unsplit/log.txt";

/// What the hypervisor is to do.
pub const CONFIG: &str = "hv.toml";

/// The directory of the guests' images, all of which the kernel gets.
pub const GUESTS: &str = "guests";

/// The UEFI loader: where firmware looks for one on a medium that it does not know (UEFI
/// specification, "Removable Media Boot Behavior").
pub const UEFI_LOADER: &str = "EFI/BOOT/BOOTX64.EFI";

/// How many guest images the kernel gets at most.
pub const MAX_FILES: usize = 128;

/// Whether a file of [`GUESTS`] is an image: file managers leave hidden files of their own behind.
pub fn is_image(name: &str) -> bool {
    !name.starts_with('.')
}

/// How much of [`KERNEL_SUM`] is looked at, in bytes.
pub const MAX_SUM: usize = 64;

/// The kernel's file is not what [`KERNEL_SUM`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Damaged {
    /// Its checksum.
    pub found: u64,
    /// What stands there, if that is a checksum.
    pub expected: Option<u64>,
}

impl fmt::Display for Damaged {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{KERNEL} is damaged: its checksum is {:016x}, {KERNEL_SUM} says ", self.found)?;
        match self.expected {
            Some(expected) => write!(f, "{expected:016x}"),
            None => f.write_str("no number of 16 hexadecimal digits"),
        }?;
        f.write_str("; write both to the stick again")
    }
}

/// Compares the kernel's file with the text of [`KERNEL_SUM`].
///
/// # Errors
///
/// They do not agree, or the text is no checksum.
pub fn check_kernel(kernel: &[u8], sum: &[u8]) -> Result<(), Damaged> {
    let (found, expected) = (checksum(kernel), parse_sum(sum));
    if expected == Some(found) { Ok(()) } else { Err(Damaged { found, expected }) }
}

fn parse_sum(text: &[u8]) -> Option<u64> {
    let digits = core::str::from_utf8(text).ok()?.trim();
    let plain = digits.len() == 16 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    u64::from_str_radix(digits, 16).ok().filter(|_| plain)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_read_whatever_the_line_ends_with() {
        for text in ["0123456789abcdef", "0123456789ABCDEF\r\n", "0123456789abcdef\n"] {
            assert_eq!(parse_sum(text.as_bytes()), Some(0x0123_4567_89ab_cdef));
        }
        for text in ["", "0123456789abcde", "0123456789abcdeg", "+123456789abcdef", "\u{fffd}"] {
            assert_eq!(parse_sum(text.as_bytes()), None, "{text}");
        }
        assert_eq!(parse_sum(&[0xff; 16]), None);
    }

    #[test]
    fn a_kernel_goes_with_its_sum_and_no_other() {
        let kernel = b"a kernel";
        let found = checksum(kernel);
        assert_eq!(check_kernel(kernel, format!("{found:016x}\n").as_bytes()), Ok(()));
        for (sum, expected, says) in [
            (format!("{:016x}", found ^ 1), Some(found ^ 1), format!("says {:016x};", found ^ 1)),
            ("oops".into(), None, "says no number of 16 hexadecimal digits;".into()),
        ] {
            let damaged = check_kernel(kernel, sum.as_bytes()).unwrap_err();
            assert_eq!(damaged, Damaged { found, expected });
            assert!(damaged.to_string().contains(&says), "{damaged}");
        }
    }
}
