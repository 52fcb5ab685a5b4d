//! The files of the stick: where they are, and which of them the kernel gets.

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

/// Reads what stands in [`KERNEL_SUM`].
pub fn parse_sum(text: &[u8]) -> Option<u64> {
    let digits = core::str::from_utf8(text).ok()?.trim();
    (digits.len() == 16).then(|| u64::from_str_radix(digits, 16).ok())?
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_are_read_whatever_the_line_ends_with() {
        for text in ["0123456789abcdef", "0123456789ABCDEF\r\n", "0123456789abcdef\n"] {
            assert_eq!(parse_sum(text.as_bytes()), Some(0x0123_4567_89ab_cdef));
        }
        for text in ["", "0123456789abcde", "0123456789abcdeg", "+123456789abcdef0", "\u{fffd}"] {
            assert_eq!(parse_sum(text.as_bytes()), None, "{text}");
        }
        assert_eq!(parse_sum(&[0xff; 16]), None);
    }
}
