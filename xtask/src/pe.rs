//! The UEFI loader as firmware wants it: the ELF file that the toolchain links becomes a PE file.
//!
//! Rust's own target for UEFI need not be installed. What is linked is a position-independent
//! executable for the host's target; its segments become sections, its relocations base relocations.

use anyhow::{Context, Result, bail, ensure};
use object::LittleEndian as Le;
use object::elf::{self, FileHeader64, Rela64};
use object::pe;
use object::read::elf::{Dyn, FileHeader, ProgramHeader, Rela};
use object::write::pe::{NtHeaders, SectionRange, Writer};

/// Size of a page: sections begin at one, as they have rights of their own.
const PAGE: u32 = 4096;
/// To what the bytes of a section are padded in the file.
const FILE_ALIGNMENT: u32 = 512;
/// Where the image would like to be. Firmware puts it where there is room.
const IMAGE_BASE: u64 = 0;
/// Number of entries in the table of data directories: all that there are.
const DIRECTORIES: usize = 16;

/// A loadable segment of the ELF file.
struct Segment<'a> {
    address: u32,
    size: u32,
    data: &'a [u8],
    name: [u8; 8],
    rights: pe::SectionFlags,
}

impl Segment<'_> {
    fn contains(&self, address: u32, bytes: u32) -> bool {
        address >= self.address
            && address - self.address < self.size
            && bytes <= self.size - (address - self.address)
    }
}

/// Makes an EFI application of a position-independent executable.
///
/// # Errors
/// If something in it cannot be expressed, or is both writable and executable.
pub fn from_elf(file: &[u8]) -> Result<Vec<u8>> {
    let header = FileHeader64::<Le>::parse(file)?;
    ensure!(header.e_machine(Le) == elf::EM_X86_64, "it is not for x86-64");
    ensure!(header.e_type(Le) == elf::ET_DYN, "it is not position-independent");
    let mut segments = segments(header, file)?;
    let relocations = relocations(header, file, &segments)?;
    let patched = relocate(&segments, &relocations)?;
    for (segment, data) in segments.iter_mut().zip(&patched) {
        segment.data = data;
    }
    let entry = u32::try_from(header.e_entry(Le)).ok();
    let entry = entry.filter(|&entry| {
        segments
            .iter()
            .any(|s| s.contains(entry, 1) && s.rights.contains(pe::IMAGE_SCN_MEM_EXECUTE))
    });
    let entry = entry.context("its entry point is not in executable code")?;
    write(&segments, &relocations, entry)
}

/// The loadable segments, by address.
fn segments<'a>(header: &FileHeader64<Le>, file: &'a [u8]) -> Result<Vec<Segment<'a>>> {
    let mut segments: Vec<Segment<'a>> = Vec::new();
    for program in header.program_headers(Le, file)? {
        let address = program.p_vaddr(Le);
        match program.p_type(Le) {
            elf::PT_LOAD if program.p_memsz(Le) > 0 => {}
            elf::PT_INTERP => bail!("it asks for a dynamic linker"),
            elf::PT_TLS => bail!("it has thread-local storage"),
            _ => continue,
        }
        let (writable, executable) =
            (program.p_flags(Le).contains(elf::PF_W), program.p_flags(Le).contains(elf::PF_X));
        // What firmware does not find by its own names it takes by its rights.
        let (name, rights) = match (writable, executable) {
            (true, true) => bail!("what is linked at {address:#x} is both writable and executable"),
            (true, false) => {
                (b".data\0\0\0", pe::IMAGE_SCN_CNT_INITIALIZED_DATA | pe::IMAGE_SCN_MEM_WRITE)
            }
            (false, true) => (b".text\0\0\0", pe::IMAGE_SCN_CNT_CODE | pe::IMAGE_SCN_MEM_EXECUTE),
            (false, false) => (b".rdata\0\0", pe::IMAGE_SCN_CNT_INITIALIZED_DATA),
        };
        let data = program.data(Le, file).ok().context("bytes of a segment are missing")?;
        ensure!(address >= u64::from(PAGE), "{address:#x} is where the headers of a PE file are");
        let start = u32::try_from(address)?;
        let size = u32::try_from(program.p_memsz(Le))?;
        ensure!(start.is_multiple_of(PAGE), "a segment is linked at {address:#x}, not at a page");
        ensure!(data.len() <= size as usize, "the segment at {address:#x} is cut off");
        if let Some(before) = segments.last() {
            let end = u64::from(before.address) + u64::from(before.size);
            ensure!(
                end.next_multiple_of(PAGE.into()) <= address,
                "the segment at {address:#x} overlaps the one before"
            );
        }
        let rights = rights | pe::IMAGE_SCN_MEM_READ;
        segments.push(Segment { address: start, size, data, name: *name, rights });
    }
    ensure!(!segments.is_empty(), "nothing in it is loaded");
    Ok(segments)
}

/// A 64-bit word that holds an address: where it is, and which address relative to the image.
struct Relocation {
    at: u32,
    value: u64,
}

/// The relocations, by address.
fn relocations(
    header: &FileHeader64<Le>,
    file: &[u8],
    segments: &[Segment<'_>],
) -> Result<Vec<Relocation>> {
    let (mut address, mut bytes) = (0, 0);
    for program in header.program_headers(Le, file)? {
        for entry in program.dynamic(Le, file)?.unwrap_or_default() {
            match entry.tag(Le) {
                elf::DT_RELA => address = entry.val(Le),
                elf::DT_RELASZ => bytes = entry.val(Le),
                elf::DT_REL | elf::DT_RELR | elf::DT_JMPREL | elf::DT_NEEDED => {
                    bail!(
                        "it needs a dynamic linker (entry {} of its dynamic section)",
                        entry.tag(Le).0
                    )
                }
                _ => {}
            }
        }
    }
    let (address, bytes) = (u32::try_from(address)?, u32::try_from(bytes)?);
    if bytes == 0 {
        return Ok(Vec::new());
    }
    let segment = segments.iter().find(|segment| segment.contains(address, bytes));
    let table = segment.and_then(|segment| {
        let start = (address - segment.address) as usize;
        segment.data.get(start..start + bytes as usize)
    });
    let table = table.context("its relocations are in no segment")?;
    let table = object::pod::slice_from_all_bytes::<Rela64<Le>>(table)
        .ok()
        .context("its relocations are cut off")?;
    let mut relocations = Vec::with_capacity(table.len());
    for entry in table {
        let kind = entry.r_type(Le, false);
        let at = entry.r_offset(Le);
        if kind != elf::R_X86_64_RELATIVE {
            bail!("the relocation at {at:#x} has type {}, only 8 (relative) is known", kind.0);
        }
        let value = entry.r_addend(Le).cast_unsigned();
        relocations.push(Relocation { at: u32::try_from(at)?, value });
    }
    relocations.sort_by_key(|relocation| relocation.at);
    Ok(relocations)
}

/// The bytes of each segment with all addresses written into them: firmware only adds to these.
fn relocate(segments: &[Segment<'_>], relocations: &[Relocation]) -> Result<Vec<Vec<u8>>> {
    let mut patched: Vec<Vec<u8>> = segments.iter().map(|segment| segment.data.to_vec()).collect();
    for Relocation { at, value } in relocations {
        let index = segments.iter().position(|segment| segment.contains(*at, 8));
        let index = index.with_context(|| format!("the relocation at {at:#x} is in no segment"))?;
        let start = (at - segments[index].address) as usize;
        let data = &mut patched[index];
        if data.len() < start + 8 {
            data.resize(start + 8, 0);
        }
        data[start..start + 8].copy_from_slice(&(IMAGE_BASE + value).to_le_bytes());
    }
    Ok(patched)
}

fn write(segments: &[Segment<'_>], relocations: &[Relocation], entry: u32) -> Result<Vec<u8>> {
    let mut file = Vec::new();
    let mut writer = Writer::new(true, PAGE, FILE_ALIGNMENT, &mut file);
    for Relocation { at, .. } in relocations {
        writer.add_reloc(*at, pe::IMAGE_REL_BASED_DIR64);
    }

    writer.reserve_dos_header_and_stub();
    writer.reserve_nt_headers(DIRECTORIES);
    // An image without base relocations cannot be moved, unless it has a section for them.
    let moved = writer.has_relocs();
    writer.reserve_section_headers((segments.len() + usize::from(moved)).try_into()?);
    ensure!(
        writer.virtual_len() <= segments[0].address,
        "it is linked where the headers of a PE file are"
    );
    let mut ranges: Vec<SectionRange> = Vec::new();
    for segment in segments {
        writer.reserve_virtual_until(segment.address);
        let bytes = segment.data.len().try_into()?;
        ranges.push(writer.reserve_section(segment.name, segment.rights, segment.size, bytes));
    }
    if moved {
        writer.reserve_reloc_section();
    }

    writer.write_dos_header_and_stub()?;
    writer.write_nt_headers(NtHeaders {
        machine: pe::IMAGE_FILE_MACHINE_AMD64,
        time_date_stamp: 0,
        characteristics: pe::IMAGE_FILE_EXECUTABLE_IMAGE
            | pe::IMAGE_FILE_LARGE_ADDRESS_AWARE
            | pe::IMAGE_FILE_LINE_NUMS_STRIPPED
            | pe::IMAGE_FILE_LOCAL_SYMS_STRIPPED
            | pe::IMAGE_FILE_DEBUG_STRIPPED,
        major_linker_version: 0,
        minor_linker_version: 0,
        address_of_entry_point: entry,
        image_base: IMAGE_BASE,
        major_operating_system_version: 0,
        minor_operating_system_version: 0,
        major_image_version: 0,
        minor_image_version: 0,
        major_subsystem_version: 0,
        minor_subsystem_version: 0,
        subsystem: pe::IMAGE_SUBSYSTEM_EFI_APPLICATION,
        // Without the flag, firmware that gives sections their rights leaves all of it executable.
        dll_characteristics: pe::IMAGE_DLLCHARACTERISTICS_NX_COMPAT
            | pe::IMAGE_DLLCHARACTERISTICS_DYNAMIC_BASE,
        size_of_stack_reserve: 0,
        size_of_stack_commit: 0,
        size_of_heap_reserve: 0,
        size_of_heap_commit: 0,
    });
    writer.write_section_headers();
    for (range, segment) in ranges.iter().zip(segments) {
        writer.write_section(range.file_offset, segment.data);
    }
    writer.write_reloc_section();
    ensure!(writer.len() == writer.reserved_len(), "the file came out at another size");
    Ok(file)
}

#[cfg(test)]
mod tests {
    use object::read::pe::{ImageNtHeaders, ImageOptionalHeader, PeFile64};
    use object::{Object, ObjectSection};

    use super::*;

    const R: u32 = 4;
    const W: u32 = 2;
    const X: u32 = 1;
    const LOAD: u32 = 1;
    const DYNAMIC: u32 = 2;

    /// Type, rights, address, bytes, size in memory.
    type Program = (u32, u32, u64, Vec<u8>, u64);

    type Change = fn(&mut Elf);

    /// An ELF file in the making.
    #[derive(Clone)]
    struct Elf {
        kind: u16,
        machine: u16,
        entry: u64,
        programs: Vec<Program>,
    }

    fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    impl Elf {
        /// Code at 0x1000, constants with two relocations at 0x2000, data of two pages at 0x3000.
        fn sound() -> Self {
            let relocations = [0x3008, 8, 0x1010, 0x2ff8, 8, 0x2000, 0x4100, 8, 0x3000];
            let mut constants = words(&relocations);
            constants.resize(0x1000, 0xcc);
            let dynamic = words(&[7, 0x2000, 8, 72, 9, 24, 0, 0]);
            Self {
                kind: 3,
                machine: 62,
                entry: 0x1010,
                programs: vec![
                    (LOAD, R | X, 0x1000, vec![0x90; 0x123], 0x123),
                    (LOAD, R, 0x2000, constants, 0x1000),
                    (LOAD, R | W, 0x3000, vec![0xdd; 0x10], 0x1800),
                    (DYNAMIC, R, 0x2800, dynamic, 64),
                ],
            }
        }

        fn bytes(&self) -> Vec<u8> {
            let count = self.programs.len();
            let mut at = 64 + 56 * count as u64;
            let (mut headers, mut contents) = (Vec::new(), Vec::new());
            for (kind, flags, address, bytes, size) in &self.programs {
                headers.extend([kind.to_le_bytes(), flags.to_le_bytes()].concat());
                let len = bytes.len() as u64;
                headers.extend(words(&[at, *address, *address, len, *size, 8]));
                contents.extend(bytes);
                at += len;
            }
            let mut file = b"\x7fELF\x02\x01\x01".to_vec();
            file.resize(16, 0);
            file.extend([self.kind.to_le_bytes(), self.machine.to_le_bytes()].concat());
            file.extend(1u32.to_le_bytes());
            file.extend(words(&[self.entry, 64, 0]));
            file.extend(0u32.to_le_bytes());
            for half in [64, 56, count as u16, 64, 0, 0] {
                file.extend(half.to_le_bytes());
            }
            [file, headers, contents].concat()
        }
    }

    fn refused(change: impl Fn(&mut Elf)) -> String {
        let mut elf = Elf::sound();
        change(&mut elf);
        from_elf(&elf.bytes()).unwrap_err().to_string()
    }

    #[test]
    fn sections_have_the_rights_of_segments() {
        let file = from_elf(&Elf::sound().bytes()).unwrap();
        let pe = PeFile64::parse(&*file).unwrap();
        let header = pe.nt_headers().optional_header();
        assert_eq!(header.address_of_entry_point(), 0x1010);
        assert_eq!(header.subsystem(), pe::IMAGE_SUBSYSTEM_EFI_APPLICATION);
        assert_eq!(header.section_alignment(), PAGE);
        assert!(header.size_of_headers() <= PAGE);
        assert_eq!(header.size_of_image(), 0x6000);
        assert!(header.dll_characteristics().contains(pe::IMAGE_DLLCHARACTERISTICS_NX_COMPAT));
        let rights = pe::IMAGE_SCN_MEM_READ | pe::IMAGE_SCN_MEM_WRITE | pe::IMAGE_SCN_MEM_EXECUTE;
        let found: Vec<_> = pe
            .section_table()
            .iter()
            .map(|section| {
                let name = String::from_utf8_lossy(section.raw_name()).into_owned();
                let rights = section.characteristics.get(Le) & rights;
                (name, section.virtual_address.get(Le), section.virtual_size.get(Le), rights)
            })
            .collect();
        let read = pe::IMAGE_SCN_MEM_READ;
        let expected = [
            (".text", 0x1000, 0x123, read | pe::IMAGE_SCN_MEM_EXECUTE),
            (".rdata", 0x2000, 0x1000, read),
            (".data", 0x3000, 0x1800, read | pe::IMAGE_SCN_MEM_WRITE),
            // Three pages with relocations, an even number on each.
            (".reloc", 0x5000, 36, read),
        ]
        .map(|(name, address, size, rights)| (name.to_owned(), address, size, rights));
        assert_eq!(found, expected);
    }

    #[test]
    fn addresses_are_written_and_listed() {
        let file = from_elf(&Elf::sound().bytes()).unwrap();
        let pe = PeFile64::parse(&*file).unwrap();
        let blocks = pe.data_directories().relocation_blocks(&*file, &pe.section_table());
        let mut blocks = blocks.unwrap().unwrap();
        let mut found = Vec::new();
        while let Some(block) = blocks.next().unwrap() {
            let real = block.filter(|relocation| relocation.typ == pe::IMAGE_REL_BASED_DIR64);
            found.extend(real.map(|relocation| relocation.virtual_address));
        }
        assert_eq!(found, [0x2ff8, 0x3008, 0x4100]);

        let word = |at: u64| {
            let section =
                pe.sections().find(|s| (s.address()..s.address() + s.size()).contains(&at));
            let section = section.unwrap();
            let start = (at - section.address()) as usize;
            u64::from_le_bytes(section.data().unwrap()[start..start + 8].try_into().unwrap())
        };
        assert_eq!([0x2ff8, 0x3008, 0x4100].map(word), [0x2000, 0x1010, 0x3000]);
        // What is not relocated is as it was, or zero.
        assert_eq!(
            [0x2048, 0x3000, 0x3010].map(word),
            [u64::from_le_bytes([0xcc; 8]), u64::from_le_bytes([0xdd; 8]), 0]
        );
    }

    #[test]
    fn nothing_is_both_writable_and_executable() {
        let why = refused(|elf| elf.programs[0].1 = R | W | X);
        assert_eq!(why, "what is linked at 0x1000 is both writable and executable");
    }

    #[test]
    fn other_relocations_are_named() {
        // R_X86_64_GLOB_DAT
        let why = refused(|elf| elf.programs[1].3[8] = 6);
        assert_eq!(why, "the relocation at 0x3008 has type 6, only 8 (relative) is known");
        for tag in [1, 17, 23, 36] {
            let why = refused(|elf| elf.programs[3].3[32] = tag);
            assert!(why.contains("dynamic linker"), "{why}");
        }
        let outside = refused(|elf| elf.programs[1].3[1] = 0x7f);
        assert_eq!(outside, "the relocation at 0x7f08 is in no segment");
        assert!(refused(|elf| elf.programs[3].3[9] = 0x60).contains("in no segment"));
        assert!(refused(|elf| elf.programs[3].3[24] = 23).contains("cut off"));
    }

    #[test]
    fn layouts_that_pe_has_not_are_refused() {
        let cases: [(Change, &str); 10] = [
            (|elf| elf.kind = 2, "not position-independent"),
            (|elf| elf.machine = 3, "not for x86-64"),
            (|elf| elf.entry = 0x2000, "entry point"),
            (|elf| elf.entry = 0x1123, "entry point"),
            (|elf| elf.programs[0].2 = 0, "headers of a PE file"),
            (|elf| elf.programs[1].2 = 0x2008, "not at a page"),
            (|elf| elf.programs[1].2 = 0x1000, "overlaps"),
            (|elf| elf.programs[2].4 = 8, "cut off"),
            (|elf| elf.programs[3].0 = 3, "dynamic linker"),
            (|elf| elf.programs[3].0 = 7, "thread-local"),
        ];
        for (change, why) in cases {
            let refused = refused(change);
            assert!(refused.contains(why), "{refused}");
        }
        assert!(from_elf(b"no ELF file").is_err());
        let file = Elf::sound().bytes();
        for len in 0..file.len() - 1 {
            assert!(from_elf(&file[..len]).is_err(), "cut to {len}");
        }
    }

    #[test]
    fn without_relocations_there_is_no_table() {
        let mut elf = Elf::sound();
        elf.programs.truncate(3);
        let file = from_elf(&elf.bytes()).unwrap();
        assert_eq!(PeFile64::parse(&*file).unwrap().sections().count(), 3);
    }
}
