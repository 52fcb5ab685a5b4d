//! How Linux gets into the reference machine: firmware that does nothing else, and a disk with the
//! kernel as it lies in memory.
//!
//! Without a BIOS, and with nothing to decompress: both would cost more than the rest of the boot.

use std::arch::global_asm;
use std::slice;

use anyhow::{Context, Result, bail, ensure};
use object::LittleEndian;
use object::elf;
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};

global_asm!(include_str!("rom.s"), options(att_syntax));

unsafe extern "C" {
    safe static linux_rom: u8;
    safe static linux_rom_end: u8;
}

/// Size of the ROM, in bytes.
const ROM: usize = 64 << 10;
/// Where the processor starts in it, and a jump to its beginning.
const RESET: usize = 0xfff0;
const JUMP: [u8; 3] = [0xe9, 0x0d, 0x00];

/// Physical addresses: page tables, boot parameters, command line. All below what Linux itself uses.
const TABLES: u32 = 0x8000;
const PARAMETERS: u32 = 0x1_0000;
const COMMAND_LINE: u32 = 0x1_1000;
/// Where the file system is, in bytes: behind the kernel.
const INITRAMFS: u32 = 128 << 20;

const SECTOR: usize = 512;
const PAGE: usize = 4096;
/// Page table entries: present, writable; and large.
const TABLE_ENTRY: u64 = 0x3;
const LARGE_ENTRY: u64 = 0x83;

/// Offsets in the boot parameters, "the zero page" (Documentation/arch/x86/zero-page.rst).
mod offset {
    pub const E820_ENTRIES: usize = 0x1e8;
    /// The setup header, in a `bzImage` too.
    pub const HEADER: usize = 0x1f1;
    /// Its length, counted from 0x202.
    pub const HEADER_LENGTH: usize = 0x201;
    pub const LOADER: usize = 0x210;
    pub const RAMDISK: usize = 0x218;
    pub const RAMDISK_SIZE: usize = 0x21c;
    pub const COMMAND_LINE: usize = 0x228;
    pub const E820: usize = 0x2d0;
}

/// The ROM.
pub fn rom() -> Vec<u8> {
    let length = (&raw const linux_rom_end).addr() - (&raw const linux_rom).addr();
    // SAFETY: the two symbols enclose the code, which nothing changes.
    let code = unsafe { slice::from_raw_parts(&raw const linux_rom, length) };
    let mut rom = vec![0; ROM];
    rom[..length].copy_from_slice(code);
    rom[RESET..RESET + JUMP.len()].copy_from_slice(&JUMP);
    rom
}

/// A run of sectors that is loaded.
struct Run {
    address: u32,
    bytes: Vec<u8>,
}

/// The disk: loads a kernel (`vmlinux`, with the header of the `bzImage` that it came in), a file system and a command line.
///
/// # Errors
/// If the kernel cannot be loaded so, or something is too large.
pub fn disk(
    header: &[u8],
    vmlinux: &[u8],
    initramfs: &[u8],
    command_line: &str,
    memory_mib: u32,
) -> Result<Vec<u8>> {
    let (entry, mut runs) = segments(vmlinux)?;
    let end = runs.iter().map(|run| run.address as usize + run.bytes.len()).max();
    ensure!(end.unwrap_or(0) <= INITRAMFS as usize, "the kernel is too large");
    let memory = u64::from(memory_mib) << 20;
    ensure!((INITRAMFS as usize + initramfs.len()) as u64 <= memory / 2, "the files are too large");
    let size = u32::try_from(initramfs.len())?;
    let parameters = parameters(header, size, memory)?;
    ensure!(command_line.len() < 2048, "the command line is too long");
    let text = [command_line.as_bytes(), &[0]].concat();
    runs.push(Run { address: TABLES, bytes: tables() });
    runs.push(Run { address: PARAMETERS, bytes: parameters });
    runs.push(Run { address: COMMAND_LINE, bytes: text });
    runs.push(Run { address: INITRAMFS, bytes: initramfs.to_vec() });

    let mut table: Vec<u32> = vec![TABLES, entry, PARAMETERS, 0];
    let mut content = Vec::new();
    for Run { address, bytes } in runs {
        let sectors = bytes.len().div_ceil(SECTOR);
        table.extend([address, u32::try_from(sectors)?]);
        content.extend(&bytes);
        content.resize(content.len().next_multiple_of(SECTOR), 0);
    }
    table.extend([0, 0]);
    let mut disk: Vec<u8> = table.into_iter().flat_map(u32::to_le_bytes).collect();
    ensure!(disk.len() <= SECTOR, "the kernel has too many segments");
    disk.resize(SECTOR, 0);
    disk.extend(content);
    // What Bochs takes for a disk has whole cylinders.
    disk.resize(disk.len().next_multiple_of(16 * 63 * SECTOR), 0);
    Ok(disk)
}

/// The kernel's physical entry and its segments. Memory is zero, so that what is not in the file need
/// not be loaded.
fn segments(vmlinux: &[u8]) -> Result<(u32, Vec<Run>)> {
    let file = ElfFile64::<LittleEndian>::parse(vmlinux).context("the kernel")?;
    let entry = u32::try_from(file.elf_header().e_entry(LittleEndian))?;
    let mut runs = Vec::new();
    for segment in file.elf_program_headers() {
        if segment.p_type(LittleEndian) != elf::PT_LOAD {
            continue;
        }
        let address = u32::try_from(segment.p_paddr(LittleEndian))?;
        let Ok(bytes) = segment.data(LittleEndian, vmlinux) else { bail!("the kernel is cut off") };
        runs.push(Run { address, bytes: bytes.to_vec() });
    }
    Ok((entry, runs))
}

/// Page tables that map the first 4 GiB to themselves.
fn tables() -> Vec<u8> {
    let mut entries = vec![0_u64; 6 * PAGE / 8];
    let table = |index: u64| (u64::from(TABLES) + index * PAGE as u64) | TABLE_ENTRY;
    entries[0] = table(1);
    for (number, entry) in (2..).zip(&mut entries[512..516]) {
        *entry = table(number);
    }
    for (number, entry) in (0..).zip(&mut entries[1024..]) {
        *entry = number << 21 | LARGE_ENTRY;
    }
    entries.into_iter().flat_map(u64::to_le_bytes).collect()
}

/// The boot parameters.
fn parameters(header: &[u8], ramdisk: u32, memory: u64) -> Result<Vec<u8>> {
    let length = *header.get(offset::HEADER_LENGTH).context("the kernel has no setup header")?;
    let end = 0x202 + usize::from(length);
    let setup = header.get(offset::HEADER..end).context("the kernel's setup header is cut off")?;
    let mut page = vec![0; PAGE];
    page[offset::HEADER..end].copy_from_slice(setup);
    let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
    // A loader without a number of its own.
    put(offset::LOADER, &[0xff]);
    put(offset::RAMDISK, &INITRAMFS.to_le_bytes());
    put(offset::RAMDISK_SIZE, &ramdisk.to_le_bytes());
    put(offset::COMMAND_LINE, &COMMAND_LINE.to_le_bytes());
    // Usable memory: all but what a PC has at the end of the first MiB.
    let usable = [(0, 0x9_fc00), (1 << 20, memory - (1 << 20))];
    put(offset::E820_ENTRIES, &[usable.len() as u8]);
    for (index, (start, bytes)) in usable.into_iter().enumerate() {
        let at = offset::E820 + index * 20;
        put(at, &u64::to_le_bytes(start));
        put(at + 8, &u64::to_le_bytes(bytes));
        put(at + 16, &1_u32.to_le_bytes());
    }
    Ok(page)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_processor_starts_at_the_beginning_of_the_rom() {
        let rom = rom();
        assert_eq!(rom.len(), ROM);
        // A jump is relative to the instruction behind it, in 16 bits.
        let [0xe9, low, high] = rom[RESET..RESET + 3] else { panic!("no jump") };
        let target = (RESET as u16 + 3).wrapping_add(u16::from_le_bytes([low, high]));
        assert_eq!(target, 0);
        // CLI, CLD.
        assert_eq!(rom[..2], [0xfa, 0xfc]);
    }

    #[test]
    fn page_tables_map_everything_to_itself() {
        let tables = tables();
        let entry = |table: usize, index: usize| {
            let at = table * PAGE + index * 8;
            u64::from_le_bytes(tables[at..at + 8].try_into().unwrap())
        };
        let table_of = |entry: u64| (entry & !0xfff) as usize;
        assert_eq!(table_of(entry(0, 0)), TABLES as usize + PAGE);
        for gib in 0..4 {
            let level_2 = (table_of(entry(1, gib)) - TABLES as usize) / PAGE;
            for index in [0, 1, 511] {
                let address = (gib << 30 | index << 21) as u64;
                assert_eq!(entry(level_2, index), address | LARGE_ENTRY);
            }
        }
    }

    #[test]
    fn boot_parameters_have_the_header_and_the_memory() {
        let mut header = vec![0; 0x400];
        header[offset::HEADER_LENGTH] = 0x60;
        header[0x202..0x206].copy_from_slice(b"HdrS");
        let page = parameters(&header, 0x1234, 64 << 20).unwrap();
        assert_eq!((page.len(), &page[0x202..0x206]), (PAGE, &b"HdrS"[..]));
        assert_eq!(page[offset::RAMDISK_SIZE..][..4], [0x34, 0x12, 0, 0]);
        assert_eq!(page[offset::E820_ENTRIES], 2);
        // The second entry: from 1 MiB, of 63 MiB.
        assert_eq!(page[offset::E820 + 20..][..8], (1_u64 << 20).to_le_bytes());
        assert_eq!(page[offset::E820 + 28..][..8], (63_u64 << 20).to_le_bytes());
        assert!(parameters(&header[..0x210], 0, 64 << 20).is_err());
    }

    #[test]
    fn what_is_no_kernel_is_refused() {
        let refused = disk(&[0; 1024], b"MZ", &[], "", 64).unwrap_err();
        assert!(refused.to_string().contains("the kernel"), "{refused}");
    }
}
