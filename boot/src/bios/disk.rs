//! The partition of the boot disk that holds the files (enhanced disk drive specification, INT 13h
//! functions 42h, 43h and 48h; the boot record has made sure that there are such).

use core::{fmt, ptr};

use boot::disk::{SECTOR, Table};
use hadris_io::{Error as FsError, ErrorKind, ErrorType};
use hadris_storage::{BlockIndex, BlockSize, sync::BlockDevice};

use super::{Registers, SCRATCH, call, drive, real_address};

/// Buffer of 64 KiB for the BIOS to read into and write from; see `bios.ld`.
const BUFFER: usize = 0x70000;

/// Sectors read or written at once: the most that the specification's first versions allow, and it
/// fits the buffer.
const CHUNK: usize = 127;

const RETRIES: u32 = 3;

/// Status of INT 13h: the disk is write-protected.
const WRITE_PROTECTED: u8 = 3;

/// What goes wrong with a disk.
#[derive(Clone, Copy, Debug)]
pub enum Error {
    /// The disk is of another kind than those this loader knows.
    SectorSize(u16),
    /// The partition does not end before the disk does.
    Truncated { end: u64, sectors: u64 },
    /// The BIOS cannot read or write.
    Transfer { function: u8, lba: u64, count: usize, status: u8 },
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self::SectorSize(bytes) => {
                write!(f, "the boot disk has sectors of {bytes} bytes, not {SECTOR}")
            }
            Self::Truncated { end, sectors } => write!(
                f,
                "the disk image is truncated: it has {end} sectors or more, the disk has {sectors}"
            ),
            Self::Transfer { function, lba, count, status } => write!(
                f,
                "INT 13h/{function:02x}h status {status:#04x}, drive {:#04x}, sector {lba} and \
                 {} more",
                drive(),
                count - 1
            ),
        }
    }
}

impl core::error::Error for Error {}

/// The partition, by sectors.
pub struct Partition {
    table: Table,
}

impl Partition {
    /// The partition of which `table` tells, if all of it is there.
    pub fn open(table: Table) -> Result<Self, Error> {
        let end = table.partition_lba.saturating_add(table.partition_sectors);
        match sectors()? {
            Some(sectors) if end > sectors => Err(Error::Truncated { end, sectors }),
            _ => Ok(Self { table }),
        }
    }

    /// Where the sectors from `first` on begin on the disk, if `bytes` bytes of them are there.
    fn place(&self, first: BlockIndex, bytes: usize) -> Result<u64, FsError<Error>> {
        let count = (bytes / SECTOR) as u64;
        let fits =
            first.get().checked_add(count).is_some_and(|end| end <= self.table.partition_sectors);
        if fits && bytes.is_multiple_of(SECTOR) {
            Ok(self.table.partition_lba + first.get())
        } else {
            Err(FsError::new(ErrorKind::InvalidInput, "not sectors of the partition"))
        }
    }
}

impl ErrorType for Partition {
    type Error = Error;
}

impl BlockDevice for Partition {
    fn block_size(&self) -> BlockSize {
        const { BlockSize::new(SECTOR as u32).unwrap() }
    }

    fn block_count(&self) -> u64 {
        self.table.partition_sectors
    }

    fn writable(&self) -> bool {
        true
    }

    fn read_blocks(&mut self, first: BlockIndex, buf: &mut [u8]) -> Result<(), FsError<Error>> {
        let mut lba = self.place(first, buf.len())?;
        for chunk in buf.chunks_mut(CHUNK * SECTOR) {
            transfer(0x42, lba, chunk.len() / SECTOR).map_err(refusal)?;
            let from = ptr::with_exposed_provenance::<u8>(BUFFER);
            // SAFETY: the buffer is the loader's, larger than any chunk, and only used here and below.
            unsafe { ptr::copy_nonoverlapping(from, chunk.as_mut_ptr(), chunk.len()) };
            lba += CHUNK as u64;
        }
        Ok(())
    }

    fn write_blocks(&mut self, first: BlockIndex, buf: &[u8]) -> Result<(), FsError<Error>> {
        let mut lba = self.place(first, buf.len())?;
        for chunk in buf.chunks(CHUNK * SECTOR) {
            let to = ptr::with_exposed_provenance_mut::<u8>(BUFFER);
            // SAFETY: as above.
            unsafe { ptr::copy_nonoverlapping(chunk.as_ptr(), to, chunk.len()) };
            transfer(0x43, lba, chunk.len() / SECTOR).map_err(refusal)?;
            lba += CHUNK as u64;
        }
        Ok(())
    }
}

/// As the file system wants to hear it.
fn refusal(error: Error) -> FsError<Error> {
    match error {
        Error::Transfer { status: WRITE_PROTECTED, .. } => ErrorKind::ReadOnly.into(),
        error => FsError::device(error, "the BIOS cannot"),
    }
}

/// Number of sectors of the boot disk, if the BIOS tells.
fn sectors() -> Result<Option<u64>, Error> {
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
        return Ok(None);
    }
    let parameters = SCRATCH.get::<30>();
    let sector_size = u16::from_le_bytes([24, 25].map(|i| parameters[i]));
    if usize::from(sector_size) != SECTOR {
        return Err(Error::SectorSize(sector_size));
    }
    let sectors = u64::from_le_bytes([16, 17, 18, 19, 20, 21, 22, 23].map(|i| parameters[i]));
    Ok(Some(sectors).filter(|sectors| *sectors != 0))
}

/// Reads (function 42h) or writes (43h) `count` sectors, at most [`CHUNK`], through the buffer.
fn transfer(function: u8, lba: u64, count: usize) -> Result<(), Error> {
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
            eax: u32::from(function) << 8,
            edx: u32::from(drive()),
            esi: u32::from(si),
            ds,
            ..Registers::default()
        };
        // SAFETY: the service writes `count` sectors to the buffer at most, and the number that it
        // moved to the packet.
        unsafe { call(0x13, &mut registers) };
        if !registers.carry() {
            return Ok(());
        }
        status = registers.ah();
        let mut reset = Registers { edx: u32::from(drive()), ..Registers::default() };
        // SAFETY: function 0 resets the drive and writes no memory.
        unsafe { call(0x13, &mut reset) };
    }
    Err(Error::Transfer { function, lba, count, status })
}
