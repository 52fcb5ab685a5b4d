//! The disk image: where a BIOS finds the loader, and the loader the files.
//!
//! Sector 0 holds the boot record, which finds its next sectors by a number that is filled in when
//! the image is made. The first of these is the [`Table`], the rest of the loader follows. The table
//! says where the partition with the files is, so that the partition table need not be read.

/// Size of a sector in bytes: the only one that BIOS disks of this format have.
pub const SECTOR: usize = 512;

/// Offset in the boot record of the number of the loader's first sector after it, 64 bits,
/// little-endian. It is part of the disk address packet with which the boot record reads.
pub const LOADER_LBA_OFFSET: usize = 0x1ac;

/// Offset in the boot record of the 32-bit sum of the loader's other sectors, taken as
/// little-endian 32-bit words.
pub const LOADER_SUM_OFFSET: usize = 0x1b4;

/// First bytes of the table's sector. The digit changes with the format.
const MAGIC: [u8; 8] = *b"UNSPLIT2";

/// Where the files are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// First sector of the partition with the files.
    pub partition_lba: u64,
    /// Its size in sectors.
    pub partition_sectors: u64,
}

impl Table {
    /// Size of the encoded table in bytes.
    pub const SIZE: usize = 8 + 2 * 8;

    /// The table as it stands at the start of its sector: magic, then little-endian numbers.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        bytes[..8].copy_from_slice(&MAGIC);
        bytes[8..16].copy_from_slice(&self.partition_lba.to_le_bytes());
        bytes[16..].copy_from_slice(&self.partition_sectors.to_le_bytes());
        bytes
    }

    /// Reads what [`Self::encode`] made; `None` if it is something else.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Option<Self> {
        let ([magic, lba, sectors], _) = bytes.as_chunks::<8>() else { return None };
        (*magic == MAGIC).then(|| Self {
            partition_lba: u64::from_le_bytes(*lba),
            partition_sectors: u64::from_le_bytes(*sectors),
        })
    }
}

/// A fast checksum against accidents, not against malice: 64-bit little-endian words, the last one
/// padded with zeros, mixed one after the other by xor, an odd multiplier and a shifted xor. Each of
/// these steps is a bijection of the state and of the word, so damage within one word never goes
/// unnoticed; the length is part of the state.
pub fn checksum(bytes: &[u8]) -> u64 {
    let mix = |state: u64, word| {
        let product = (state ^ u64::from_le_bytes(word)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        product ^ product >> 32
    };
    let (words, rest) = bytes.as_chunks::<8>();
    let state = words.iter().fold(!(bytes.len() as u64), |state, word| mix(state, *word));
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    mix(state, last)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn table_survives_and_is_recognised() {
        let table = Table { partition_lba: 2048, partition_sectors: 1 << 33 };
        let mut bytes = table.encode();
        assert_eq!(Table::decode(&bytes), Some(table));
        bytes[7] = b'0';
        assert_eq!(Table::decode(&bytes), None);
    }

    #[test]
    fn checksum_sees_flips_swaps_and_lengths() {
        let data: Vec<u8> = (0..100u8).collect();
        let sum = checksum(&data);
        for bit in 0..data.len() * 8 {
            let mut damaged = data.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            assert_ne!(checksum(&damaged), sum, "bit {bit}");
            // Two flips of a word's top bit must not cancel.
            for other in (63..data.len() * 8).step_by(64).filter(|&other| other != bit) {
                let mut twice = damaged.clone();
                twice[other / 8] ^= 1 << (other % 8);
                assert_ne!(checksum(&twice), sum, "bits {bit} and {other}");
            }
        }
        let mut swapped = data.clone();
        swapped.swap(3, 11);
        assert_ne!(checksum(&swapped), sum);
        assert_ne!(checksum(&data[..99]), sum);
        let mut longer = data.clone();
        longer.push(0);
        assert_ne!(checksum(&longer), sum);
        assert_ne!(checksum(&[]), checksum(&[0]));
    }
}
