//! Finding the ACPI root pointer in BIOS memory.

/// Size of the part of the structure that its first checksum covers, in bytes.
const SIZE: usize = 20;

/// Offset of the Root System Description Pointer in `area`, which starts at a multiple of 16. The
/// structure is recognised by signature and checksum (ACPI specification, "Finding the RSDP on
/// IA-PC Systems").
pub fn find(area: &[u8]) -> Option<usize> {
    (0..area.len()).step_by(16).find(|&offset| {
        area.get(offset..offset + SIZE).is_some_and(|candidate| {
            candidate.starts_with(b"RSD PTR ")
                && candidate.iter().fold(0, |sum: u8, byte| sum.wrapping_add(*byte)) == 0
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pointer() -> [u8; SIZE] {
        let mut bytes = *b"RSD PTR \0MAKER \0\x34\x12\0\0";
        bytes[8] = 0u8.wrapping_sub(bytes.iter().fold(0, |a, b| a.wrapping_add(*b)));
        bytes
    }

    #[test]
    fn found_on_a_paragraph_only_and_with_a_right_sum_only() {
        let mut area = [0; 128];
        area[8..28].copy_from_slice(&pointer());
        assert_eq!(find(&area), None);
        area[32..52].copy_from_slice(&pointer());
        area[33 + 10] ^= 1;
        assert_eq!(find(&area), None);
        area[96..116].copy_from_slice(&pointer());
        assert_eq!(find(&area), Some(96));
        assert_eq!(find(&area[..115]), None);
        assert_eq!(find(&[]), None);
    }
}
