//! The x86/HVM direct boot ABI (PVH): an ELF image with a note that names its 32-bit entry.
//!
//! Source: Xen's documentation, "x86/HVM direct boot ABI", and `xen/include/public/arch-x86/hvm/
//! start_info.h`.

use core::fmt;

use object::LittleEndian;
use object::elf::{FileHeader32, FileHeader64, PT_LOAD};
use object::read::elf::{FileHeader, ProgramHeader};
use vmx::addr::GuestPhysAddr;

use crate::guest_memory::GuestMemory;

/// XEN_ELFNOTE_PHYS32_ENTRY.
const NOTE_PHYS32_ENTRY: u32 = 18;
/// Where `hvm_start_info` goes, with the memory map and the command line behind it.
const START_INFO: u64 = 0x7000;
/// The page that is kept free for it.
const START_INFO_BYTES: u64 = 0x1000;
/// XEN_HVM_START_MAGIC_VALUE.
const MAGIC: u32 = 0x336e_c578;
/// XEN_HVM_MEMMAP_TYPE_RAM.
const MEMMAP_RAM: u32 = 1;
/// Between these a PC has its video memory and ROMs.
const ISA_HOLE: (u64, u64) = (0xa_0000, 0x10_0000);

/// Where and how a guest starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The 32-bit entry point.
    pub rip: u32,
    /// For EBX: the address of `hvm_start_info`.
    pub start_info: u32,
}

/// Why an image cannot be started. The operator's to mend.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ImageError {
    /// Neither ELF nor anything else that is known.
    UnknownFormat,
    /// An ELF file that contradicts itself, or is cut off.
    Damaged(&'static str),
    /// No XEN_ELFNOTE_PHYS32_ENTRY.
    NoEntryNote,
    /// A segment does not fit into the VM's memory.
    DoesNotFit {
        /// Where it would end.
        end: u64,
        /// How much memory there is.
        memory: u64,
    },
    /// A segment lies where the start information goes.
    Overlap,
    /// The command line is too long.
    CommandLine,
}

impl fmt::Display for ImageError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::UnknownFormat => f.write_str(
                "unknown guest format: expected an ELF image with a PVH entry note \
                 (XEN_ELFNOTE_PHYS32_ENTRY)",
            ),
            Self::Damaged(what) => write!(f, "damaged ELF image: {what}; copy or build it again"),
            Self::NoEntryNote => f.write_str(
                "ELF image without PVH entry: add the note XEN_ELFNOTE_PHYS32_ENTRY (owner Xen, \
                 type 18)",
            ),
            Self::DoesNotFit { end, memory } => write!(
                f,
                "too little memory: the image reaches up to {end:#x}, the VM has {} MiB; \
                 set memory_mib to at least {}",
                memory >> 20,
                end.div_ceil(2 << 20).saturating_mul(2),
            ),
            Self::Overlap => write!(
                f,
                "the image uses {START_INFO:#x} to {:#x}, which is kept for start information; \
                 link it elsewhere",
                START_INFO + START_INFO_BYTES
            ),
            Self::CommandLine => f.write_str("cmdline is longer than 2048 bytes; shorten it"),
        }
    }
}

/// What of an ELF image goes to which guest-physical address.
trait Target {
    fn len(&self) -> u64;
    fn write(&mut self, gpa: u64, bytes: &[u8]);
}

impl Target for GuestMemory {
    fn len(&self) -> u64 {
        GuestMemory::len(self)
    }

    fn write(&mut self, gpa: u64, bytes: &[u8]) {
        GuestMemory::write(self, GuestPhysAddr::new_truncate(gpa), bytes)
            .expect("the caller has compared with the memory's size");
    }
}

/// Loads `image` into the zeroed `memory`.
///
/// # Errors
///
/// [`ImageError`]; the memory's contents are undefined then.
pub fn load(memory: &mut GuestMemory, image: &[u8], cmdline: &str) -> Result<Entry, ImageError> {
    load_into(memory, image, cmdline)
}

fn load_into(memory: &mut impl Target, image: &[u8], cmdline: &str) -> Result<Entry, ImageError> {
    let rip = match image.get(..5) {
        Some([0x7f, b'E', b'L', b'F', 1]) => load_elf::<FileHeader32<LittleEndian>>(memory, image)?,
        Some([0x7f, b'E', b'L', b'F', 2]) => load_elf::<FileHeader64<LittleEndian>>(memory, image)?,
        _ => return Err(ImageError::UnknownFormat),
    };
    write_start_info(memory, cmdline)?;
    Ok(Entry { rip, start_info: START_INFO as u32 })
}

fn load_elf<E>(memory: &mut impl Target, image: &[u8]) -> Result<u32, ImageError>
where
    E: FileHeader<Endian = LittleEndian>,
{
    let damaged = ImageError::Damaged;
    let endian = LittleEndian;
    let header = E::parse(image).map_err(|_| damaged("its header"))?;
    let segments = header.program_headers(endian, image).map_err(|_| damaged("program headers"))?;
    let mut entry = None;
    for segment in segments {
        if let Some(mut notes) =
            segment.notes(endian, image).map_err(|_| damaged("a note segment"))?
        {
            while let Some(note) = notes.next().map_err(|_| damaged("a note"))? {
                if note.name() == b"Xen" && note.n_type(endian).0 == NOTE_PHYS32_ENTRY {
                    let bytes = note.desc().first_chunk().ok_or(damaged("the PVH entry note"))?;
                    entry = Some(u32::from_le_bytes(*bytes));
                }
            }
        }
        if segment.p_type(endian) != PT_LOAD {
            continue;
        }
        let start: u64 = segment.p_paddr(endian).into();
        let size: u64 = segment.p_memsz(endian).into();
        let bytes =
            segment.data(endian, image).map_err(|()| damaged("it ends within a segment"))?;
        let end = start.checked_add(size).ok_or(damaged("a segment's address"))?;
        if bytes.len() as u64 > size {
            return Err(damaged("a segment is longer in the file than in memory"));
        }
        if end > memory.len() {
            return Err(ImageError::DoesNotFit { end, memory: memory.len() });
        }
        if start < START_INFO + START_INFO_BYTES && end > START_INFO {
            return Err(ImageError::Overlap);
        }
        memory.write(start, bytes);
    }
    entry.ok_or(ImageError::NoEntryNote)
}

/// `hvm_start_info` version 1, then the memory map, then the command line.
fn write_start_info(memory: &mut impl Target, cmdline: &str) -> Result<(), ImageError> {
    const MEMMAP: u64 = START_INFO + 0x100;
    const CMDLINE: u64 = START_INFO + 0x200;
    if cmdline.len() > 2048 {
        return Err(ImageError::CommandLine);
    }
    let mut map = [0; 48];
    let top = memory.len();
    for (entry, (start, end)) in map.chunks_exact_mut(24).zip([(0, ISA_HOLE.0), (ISA_HOLE.1, top)])
    {
        entry[..8].copy_from_slice(&u64::to_le_bytes(start));
        entry[8..16].copy_from_slice(&u64::to_le_bytes(end - start));
        entry[16..20].copy_from_slice(&MEMMAP_RAM.to_le_bytes());
    }
    let mut info = [0; 56];
    let words: [(usize, u64, usize); 5] =
        [(0, u64::from(MAGIC), 4), (4, 1, 4), (24, CMDLINE, 8), (40, MEMMAP, 8), (48, 2, 4)];
    for (offset, value, size) in words {
        info[offset..offset + size].copy_from_slice(&value.to_le_bytes()[..size]);
    }
    memory.write(START_INFO, &info);
    memory.write(MEMMAP, &map);
    memory.write(CMDLINE, cmdline.as_bytes());
    memory.write(CMDLINE + cmdline.len() as u64, &[0]);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{vec, vec::Vec};

    impl Target for Vec<u8> {
        fn len(&self) -> u64 {
            Vec::len(self) as u64
        }
        fn write(&mut self, gpa: u64, bytes: &[u8]) {
            self[gpa as usize..][..bytes.len()].copy_from_slice(bytes);
        }
    }

    /// A minimal ELF64 image: one segment at 1 MiB, one note.
    fn image() -> Vec<u8> {
        let mut image = vec![0; 0x130];
        let put = |image: &mut Vec<u8>, at: usize, value: u64, size: usize| {
            image[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
        };
        image[..6].copy_from_slice(b"\x7fELF\x02\x01");
        for (at, value, size) in [
            (6, 1, 1),
            (16, 2, 2),
            (18, 62, 2),
            (20, 1, 4),
            (32, 64, 8),
            (52, 64, 2),
            (54, 56, 2),
            (56, 2, 2),
            // PT_LOAD: offset 0x100, paddr 1 MiB, 16 bytes in the file, 32 in memory.
            (64, 1, 4),
            (68, 5, 4),
            (72, 0x100, 8),
            (80, 0x10_0000, 8),
            (88, 0x10_0000, 8),
            (96, 16, 8),
            (104, 32, 8),
            (112, 0x1000, 8),
            // PT_NOTE: offset 0x110, 20 bytes.
            (120, 4, 4),
            (128, 0x110, 8),
            (152, 20, 8),
            (160, 20, 8),
            (168, 4, 8),
            (0x110, 4, 4),
            (0x114, 4, 4),
            (0x118, 18, 4),
            (0x120, 0x10_0004, 4),
        ] {
            put(&mut image, at, value, size);
        }
        image[0x11c..0x11f].copy_from_slice(b"Xen");
        image[0x100..0x110].fill(0xcc);
        image
    }

    #[test]
    fn a_good_image_loads() {
        let mut memory = vec![0; 2 << 20];
        let entry = load_into(&mut memory, &image(), "hello").unwrap();
        assert_eq!(entry, Entry { rip: 0x10_0004, start_info: START_INFO as u32 });
        assert_eq!(memory[0x10_0000..0x10_0020], [[0xcc; 16], [0; 16]].concat());
        assert_eq!(memory[0x7000..0x7004], MAGIC.to_le_bytes());
        assert_eq!(&memory[0x7200..0x7206], b"hello\0");
        assert_eq!(memory[0x7108..0x7110], 0xa_0000u64.to_le_bytes());
        assert_eq!(memory[0x7120..0x7128], 0x10_0000u64.to_le_bytes());
    }

    #[test]
    fn bad_images_are_named() {
        let mut memory = vec![0; 2 << 20];
        let mut load = |image: &[u8]| load_into(&mut memory, image, "").unwrap_err();
        assert_eq!(load(b""), ImageError::UnknownFormat);
        assert_eq!(load(b"MZ and more"), ImageError::UnknownFormat);
        assert_eq!(load(&image()[..0x20]), ImageError::Damaged("its header"));
        assert_eq!(load(&image()[..0x108]), ImageError::Damaged("it ends within a segment"));
        let mut other = image();
        other[0x118] = 17;
        assert_eq!(load(&other), ImageError::NoEntryNote);
        let mut far = image();
        far[91] = 0x40;
        assert!(matches!(load(&far), ImageError::DoesNotFit { .. }));
        let mut low = image();
        low[88..96].copy_from_slice(&0x7ff0u64.to_le_bytes());
        assert_eq!(load(&low), ImageError::Overlap);
    }

    #[test]
    fn no_image_makes_the_loader_panic() {
        let good = image();
        let mut memory = vec![0; 2 << 20];
        for at in 0..good.len() {
            for value in [0, 1, 0x7f, 0xff] {
                let mut image = good.clone();
                image[at] = value;
                let _ = load_into(&mut memory, &image, "");
            }
            let _ = load_into(&mut memory, &good[..at], "");
        }
    }

    #[test]
    fn a_long_command_line_is_refused() {
        let mut memory = vec![0; 2 << 20];
        let line = "x".repeat(2049);
        assert_eq!(load_into(&mut memory, &image(), &line), Err(ImageError::CommandLine));
    }
}
