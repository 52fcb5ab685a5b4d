//! The disk image: what stands where.
//!
//! Sector 0 holds the master boot record, sector 1 the [`Table`], the sectors after it the rest of
//! the loader; kernel and ramdisk follow where the table says. Each part has a checksum, so that a
//! damaged or truncated image is told from a faulty program.

/// Size of a sector in bytes: the only one that BIOS disks of this format have.
pub const SECTOR: usize = 512;

/// Offset in the boot record of the 32-bit sum of the loader's other sectors, taken as
/// little-endian 32-bit words.
pub const LOADER_SUM_OFFSET: usize = 0x1b4;

/// First bytes of the table's sector. The digit changes with the format.
const MAGIC: [u8; 8] = *b"UNSPLIT1";

/// A file on the disk.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Extent {
    /// First sector.
    pub lba: u64,
    /// Length in bytes; 0 says that there is no such file.
    pub bytes: u64,
    /// The [`checksum`] of these bytes.
    pub checksum: u64,
}

impl Extent {
    /// One above the last sector.
    pub fn end(&self) -> u64 {
        self.lba.saturating_add(self.bytes.div_ceil(SECTOR as u64))
    }
}

/// Where the files are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Table {
    /// The kernel's ELF file.
    pub kernel: Extent,
    /// The ramdisk.
    pub ramdisk: Extent,
}

impl Table {
    /// Size of the encoded table in bytes.
    pub const SIZE: usize = 8 + 6 * 8;

    /// The table as it stands at the start of sector 1: magic, then six little-endian numbers.
    pub fn encode(&self) -> [u8; Self::SIZE] {
        let mut bytes = [0; Self::SIZE];
        let (magic, numbers) = bytes.split_at_mut(8);
        magic.copy_from_slice(&MAGIC);
        let values = [self.kernel, self.ramdisk].map(|e| [e.lba, e.bytes, e.checksum]);
        for (slot, value) in numbers.chunks_exact_mut(8).zip(values.as_flattened()) {
            slot.copy_from_slice(&value.to_le_bytes());
        }
        bytes
    }

    /// Reads what [`Self::encode`] made; `None` if it is something else.
    pub fn decode(bytes: &[u8; Self::SIZE]) -> Option<Self> {
        let (magic, numbers) = bytes.split_at(8);
        let (numbers, _) = numbers.as_chunks::<8>();
        let extent = |first: usize| Extent {
            lba: u64::from_le_bytes(numbers[first]),
            bytes: u64::from_le_bytes(numbers[first + 1]),
            checksum: u64::from_le_bytes(numbers[first + 2]),
        };
        (magic == MAGIC).then(|| Self { kernel: extent(0), ramdisk: extent(3) })
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
        let table = Table {
            kernel: Extent { lba: 100, bytes: 5000, checksum: 0x1234_5678_9abc_def0 },
            ramdisk: Extent { lba: 110, bytes: 1 << 28, checksum: u64::MAX },
        };
        let mut bytes = table.encode();
        assert_eq!(Table::decode(&bytes), Some(table));
        assert_eq!(table.kernel.end(), 110);
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
