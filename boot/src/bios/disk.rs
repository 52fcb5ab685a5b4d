//! Reading the boot disk by block number (enhanced disk drive specification, INT 13h functions 42h
//! and 48h; the boot record has made sure that there are such).

use core::{fmt, ptr};

use boot::disk::{Extent, SECTOR};

use super::{Registers, SCRATCH, call, drive, real_address};

/// Buffer of 64 KiB for the BIOS to read into; see `bios.ld`.
const BUFFER: usize = 0x70000;

/// Sectors read at once: the most that the specification's first versions allow, and it fits the
/// buffer.
const CHUNK: u64 = 127;

const RETRIES: u32 = 3;

/// What goes wrong with a disk.
#[derive(Debug)]
pub enum Error {
    /// The BIOS cannot tell the disk's size.
    NoParameters { status: u8 },
    /// The disk is of another kind than those this loader knows.
    SectorSize(u16),
    /// Something stands behind the end of the disk.
    Truncated { what: &'static str, end: u64, sectors: u64 },
    /// The BIOS cannot read.
    Read { what: &'static str, lba: u64, count: u64, status: u8 },
    /// What was read is not what was written.
    Damaged { what: &'static str, found: u64, expected: u64 },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::NoParameters { status } => {
                write!(
                    f,
                    "the BIOS cannot describe the boot disk: INT 13h/48h status {status:#04x}"
                )
            }
            Self::SectorSize(bytes) => {
                write!(f, "the boot disk has sectors of {bytes} bytes, not {SECTOR}")
            }
            Self::Truncated { what, end, sectors } => write!(
                f,
                "the disk image is truncated: {what} ends at sector {end}, the disk has {sectors}"
            ),
            Self::Read { what, lba, count, status } => write!(
                f,
                "cannot read {what}: INT 13h/42h status {status:#04x} for {count} sectors from \
                 {lba} of drive {:#04x}",
                drive()
            ),
            Self::Damaged { what, found, expected } => write!(
                f,
                "{what} on the disk is damaged: its checksum is {found:016x}, not {expected:016x}"
            ),
        }
    }
}

/// Number of sectors of the boot disk.
pub fn sectors() -> Result<u64, Error> {
    let (ds, si) = SCRATCH.put(&30u16.to_le_bytes());
    let mut registers = Registers {
        eax: 0x4800,
        edx: u32::from(drive()),
        esi: u32::from(si),
        ds,
        ..Registers::default()
    };
    // SAFETY: the service writes at most the 30 bytes that the buffer says it has.
    unsafe { call(0x13, &mut registers) };
    if registers.carry() {
        return Err(Error::NoParameters { status: registers.ah() });
    }
    let parameters = SCRATCH.get();
    let sector_size = u16::from_le_bytes([24, 25].map(|i| parameters[i]));
    if usize::from(sector_size) != SECTOR {
        return Err(Error::SectorSize(sector_size));
    }
    Ok(u64::from_le_bytes([16, 17, 18, 19, 20, 21, 22, 23].map(|i| parameters[i])))
}

/// Reads the file `what` to memory at `to`.
///
/// # Safety
///
/// `to` is valid for writes of all the file's bytes, and not memory that the BIOS uses.
pub unsafe fn read(what: &'static str, file: Extent, to: *mut u8) -> Result<(), Error> {
    let mut done = 0;
    while done < file.bytes {
        let lba = file.lba + done / SECTOR as u64;
        let count = (file.end() - lba).min(CHUNK);
        read_chunk(what, lba, count)?;
        let bytes = (count * SECTOR as u64).min(file.bytes - done) as usize;
        let from = ptr::with_exposed_provenance::<u8>(BUFFER);
        // SAFETY: the buffer is the loader's and does not overlap what the caller vouches for,
        // which has room for all of the file.
        unsafe { ptr::copy_nonoverlapping(from, to.add(done as usize), bytes) };
        done += bytes as u64;
    }
    Ok(())
}

/// Reads `count` sectors from `lba` on into the buffer.
fn read_chunk(what: &'static str, lba: u64, count: u64) -> Result<(), Error> {
    let mut status = 0;
    for _ in 0..RETRIES {
        let (segment, offset) = real_address(BUFFER);
        let mut packet = [0; 16];
        packet[0] = packet.len() as u8;
        packet[2..4].copy_from_slice(&(count as u16).to_le_bytes());
        packet[4..6].copy_from_slice(&offset.to_le_bytes());
        packet[6..8].copy_from_slice(&segment.to_le_bytes());
        packet[8..].copy_from_slice(&lba.to_le_bytes());
        let (ds, si) = SCRATCH.put(&packet);
        let mut registers = Registers {
            eax: 0x4200,
            edx: u32::from(drive()),
            esi: u32::from(si),
            ds,
            ..Registers::default()
        };
        // SAFETY: the service writes `count` sectors to the buffer, at most 127 of them, and the
        // number that it read to the packet.
        unsafe { call(0x13, &mut registers) };
        if !registers.carry() {
            return Ok(());
        }
        status = registers.ah();
        let mut reset = Registers { edx: u32::from(drive()), ..Registers::default() };
        // SAFETY: function 0 resets the drive and writes no memory.
        unsafe { call(0x13, &mut reset) };
    }
    Err(Error::Read { what, lba, count, status })
}
