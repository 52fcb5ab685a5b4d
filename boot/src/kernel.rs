//! Reading the kernel's ELF file. Nothing in it is trusted: what does not make sense is an error.

use core::ops::Range;

use arrayvec::ArrayVec;
use bootloader_api::{BootloaderConfig, info::TlsTemplate};
use object::{
    LittleEndian as Le,
    elf::{self, FileHeader64, Rela64},
    read::elf::{Dyn, FileHeader, ProgramHeader, Rela, SectionHeader},
};

use crate::{Error, PAGE, paging::Access};

/// How many loadable segments a kernel may have.
pub const MAX_SEGMENTS: usize = 16;

/// Size of what identifies the configuration's format at its start, in bytes: 16 of UUID, 7 of
/// version.
const CONFIG_FORMAT: usize = 23;

/// A loadable segment. Addresses are as linked: relative to the load address if the kernel is
/// position-independent.
#[derive(Clone, Copy, Debug)]
pub struct Segment<'a> {
    /// Address of the first byte.
    pub address: u64,
    /// The bytes that stand in the file.
    pub data: &'a [u8],
    /// Size in memory in bytes, at least 1 and at least that of `data`; the rest is zero.
    pub size: u64,
    /// The rights that its pages get.
    pub access: Access,
}

impl Segment<'_> {
    /// Address of the first page.
    pub fn first_page(&self) -> u64 {
        self.address - self.address % PAGE
    }

    /// Address of the last page.
    pub fn last_page(&self) -> u64 {
        let last = self.address + (self.size - 1);
        last - last % PAGE
    }

    /// Size of its pages in bytes.
    pub fn page_bytes(&self) -> u64 {
        (self.last_page() - self.first_page()).saturating_add(PAGE)
    }

    /// Whether all of `address..address + bytes` lies in the segment.
    fn contains(&self, address: u64, bytes: u64) -> bool {
        address >= self.address
            && address - self.address < self.size
            && bytes <= self.size - (address - self.address)
    }
}

/// A kernel that makes sense as far as can be said without placing it.
#[derive(Debug)]
pub struct Kernel<'a> {
    /// What the kernel wants of the loader.
    pub config: BootloaderConfig,
    /// What to load, in pages that no two segments share.
    pub segments: ArrayVec<Segment<'a>, MAX_SEGMENTS>,
    /// Where to start it; in an executable segment.
    pub entry: u64,
    /// Whether the loader decides about the address.
    pub position_independent: bool,
    /// Template of the thread-local storage, its address as linked.
    pub tls: Option<TlsTemplate>,
    /// Pages that nobody writes once they are relocated.
    pub relro: Range<u64>,
    /// To be applied once the load address is known.
    relocations: &'a [Rela64<Le>],
}

impl<'a> Kernel<'a> {
    /// Reads `file`, the whole ELF file.
    pub fn parse(file: &'a [u8]) -> Result<Self, Error> {
        let header = FileHeader64::<Le>::parse(file)?;
        let endian = header.endian()?;
        if header.e_machine(endian) != elf::EM_X86_64 {
            return Err(Error::BadElf("it is not for x86-64"));
        }
        let position_independent = match header.e_type(endian) {
            elf::ET_EXEC => false,
            elf::ET_DYN => true,
            _ => {
                return Err(Error::BadElf("it is neither an executable nor position-independent"));
            }
        };

        let mut kernel = Self {
            config: config(header, endian, file)?,
            segments: ArrayVec::new(),
            entry: header.e_entry(endian),
            position_independent,
            tls: None,
            relro: 0..0,
            relocations: &[],
        };
        let headers = header.program_headers(endian, file)?;
        for (index, program) in headers.iter().enumerate() {
            let bad = |why| Error::BadSegment { index, why };
            let address = program.p_vaddr(endian);
            let size = program.p_memsz(endian);
            let end = address.checked_add(size).ok_or(bad("it wraps around the address space"))?;
            match program.p_type(endian) {
                elf::PT_LOAD if size > 0 => {
                    let data =
                        program.data(endian, file).map_err(|()| bad("its bytes are missing"))?;
                    if data.len() as u64 > size {
                        return Err(bad("it is larger in the file than in memory"));
                    }
                    let flags = program.p_flags(endian);
                    let access = match (flags.contains(elf::PF_W), flags.contains(elf::PF_X)) {
                        (true, true) => return Err(bad("it is both writable and executable")),
                        (true, false) => Access::ReadWrite,
                        (false, true) => Access::Execute,
                        (false, false) => Access::ReadOnly,
                    };
                    let new = Segment { address, data, size, access };
                    let shares_page = |other: &Segment<'_>| {
                        new.first_page() <= other.last_page()
                            && other.first_page() <= new.last_page()
                    };
                    if kernel.segments.iter().any(shares_page) {
                        return Err(bad("it shares a page with another one"));
                    }
                    kernel.segments.try_push(new).map_err(|_| bad("there are too many"))?;
                }
                elf::PT_TLS => {
                    let file_size = program.p_filesz(endian);
                    kernel.tls =
                        Some(TlsTemplate { start_addr: address, file_size, mem_size: size });
                }
                // Page by page as dynamic linkers do it: both ends rounded down.
                elf::PT_GNU_RELRO => kernel.relro = address - address % PAGE..end - end % PAGE,
                elf::PT_INTERP => return Err(bad("it asks for a dynamic linker")),
                _ => {}
            }
        }
        let entered = kernel.segments.iter().find(|s| s.contains(kernel.entry, 1));
        if entered.is_none_or(|s| s.access != Access::Execute) {
            return Err(Error::BadElf("its entry point is not in an executable segment"));
        }
        for (index, program) in headers.iter().enumerate() {
            if let Some(dynamic) = program.dynamic(endian, file)? {
                let entries = dynamic.iter().map(|d| (d.tag(endian), d.val(endian)));
                kernel.relocations = kernel.relocation_table(index, entries)?;
            }
        }
        Ok(kernel)
    }

    /// Address of the lowest page, and how many bytes lie between it and the end of the highest.
    pub fn span(&self) -> (u64, u64) {
        let first = self.segments.iter().map(Segment::first_page).min().unwrap_or(0);
        let last = self.segments.iter().map(Segment::last_page).max().unwrap_or(0);
        (first, (last - first).saturating_add(PAGE))
    }

    /// The words to be written because the kernel was loaded `bias` bytes above its link address:
    /// index of the segment, offset in it in bytes, value.
    pub fn relocated(
        &self,
        bias: u64,
    ) -> impl Iterator<Item = Result<(usize, u64, u64), Error>> + '_ {
        self.relocations.iter().map(move |entry| {
            if entry.r_type(Le, false) != elf::R_X86_64_RELATIVE {
                return Err(Error::BadRelocation("only R_X86_64_RELATIVE is known"));
            }
            let target = entry.r_offset(Le);
            let index = self.segments.iter().position(|s| s.contains(target, 8));
            let index = index.ok_or(Error::BadRelocation("the target is in no segment"))?;
            let value = bias.wrapping_add(entry.r_addend(Le).cast_unsigned());
            Ok((index, target - self.segments[index].address, value))
        })
    }

    /// Finds the table of relocations with addends; other forms than that are refused.
    fn relocation_table(
        &self,
        index: usize,
        entries: impl Iterator<Item = (elf::DynamicTag, u64)>,
    ) -> Result<&'a [Rela64<Le>], Error> {
        let (mut address, mut bytes) = (0, 0);
        for (tag, value) in entries.take_while(|(tag, _)| *tag != elf::DT_NULL) {
            match tag {
                elf::DT_RELA => address = value,
                elf::DT_RELASZ => bytes = value,
                elf::DT_RELAENT if value != size_of::<Rela64<Le>>() as u64 => {
                    return Err(Error::BadRelocation("the size of an entry is wrong"));
                }
                elf::DT_REL | elf::DT_RELR | elf::DT_JMPREL | elf::DT_NEEDED => {
                    return Err(Error::BadSegment { index, why: "it needs a dynamic linker" });
                }
                _ => {}
            }
        }
        if bytes == 0 {
            return Ok(&[]);
        }
        let table = self.segments.iter().find(|s| s.contains(address, bytes)).and_then(|s| {
            let start = usize::try_from(address - s.address).ok()?;
            s.data.get(start..start.checked_add(usize::try_from(bytes).ok()?)?)
        });
        let table = table.ok_or(Error::BadRelocation("the table is in no segment"))?;
        object::pod::slice_from_all_bytes(table)
            .map_err(|()| Error::BadRelocation("the table is cut off"))
    }
}

/// The configuration that `bootloader_api::entry_point!` leaves in a section of its own.
fn config(header: &FileHeader64<Le>, endian: Le, file: &[u8]) -> Result<BootloaderConfig, Error> {
    let sections = header.sections(endian, file)?;
    let (_, section) = sections
        .section_by_name(endian, b".bootloader-config")
        .ok_or(Error::BadConfig("there is none; is this a bootloader_api kernel?"))?;
    let bytes = section.data(endian, file)?;
    // The crate keeps the version to itself; its serialised form does not.
    let ours = BootloaderConfig::new_default().serialize();
    if bytes.len() != ours.len() || bytes[..CONFIG_FORMAT] != ours[..CONFIG_FORMAT] {
        return Err(Error::BadConfig("it is not of the bootloader_api version of this loader"));
    }
    BootloaderConfig::deserialize(bytes).map_err(Error::BadConfig)
}

impl From<object::read::Error> for Error {
    fn from(error: object::read::Error) -> Self {
        Self::Elf(error)
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// What a test does to a sound file.
    type Change = fn(&mut Elf);

    pub const R: u32 = 4;
    pub const W: u32 = 2;
    pub const X: u32 = 1;

    /// An ELF file as its parts.
    #[derive(Clone)]
    pub struct Elf {
        pub kind: u16,
        pub machine: u16,
        pub entry: u64,
        /// Type, flags, address, bytes in the file, size in memory.
        pub programs: Vec<(u32, u32, u64, Vec<u8>, u64)>,
        pub config: Vec<u8>,
    }

    pub const LOAD: u32 = 1;
    pub const DYNAMIC: u32 = 2;
    pub const TLS: u32 = 7;
    pub const RELRO: u32 = 0x6474_e552;

    pub const BASE: u64 = 0xffff_ffff_8000_0000;

    impl Elf {
        /// A sound static kernel: read-only, executable and writable segments, the last with zeroed
        /// memory behind what is in the file, and starting inside a page.
        pub fn sound() -> Self {
            Self {
                kind: 2,
                machine: 62,
                entry: BASE + 0x2010,
                programs: vec![
                    (LOAD, R, BASE, vec![0x11; 0x1800], 0x1800),
                    (LOAD, R | X, BASE + 0x2000, vec![0x22; 0x100], 0x100),
                    (LOAD, R | W, BASE + 0x3f00, vec![0x33; 0x200], 0x2000),
                ],
                config: BootloaderConfig::new_default().serialize().to_vec(),
            }
        }

        /// The same, position-independent, with one relocation: the word at 0x4000 is to hold the
        /// address of what is linked at 0x2010.
        pub fn relocatable() -> Self {
            let mut elf = Self::sound();
            elf.kind = 3;
            for program in &mut elf.programs {
                program.2 -= BASE;
            }
            elf.entry -= BASE;
            let rela = words(&[0x4000, 8, 0x2010]);
            elf.programs[0].3[..24].copy_from_slice(&rela);
            let dynamic = words(&[7, 0, 8, 24, 9, 24, 0, 0]);
            elf.programs.push((DYNAMIC, R, 0x1000, dynamic, 64));
            elf
        }

        pub fn bytes(&self) -> Vec<u8> {
            let names = b"\0.bootloader-config\0.shstrtab\0";
            let count = self.programs.len();
            let mut offset = 64 + 56 * count;
            let mut headers = Vec::new();
            let mut contents = Vec::new();
            let mut add = |bytes: &[u8]| {
                let at = offset;
                contents.extend_from_slice(bytes);
                contents.resize(contents.len().next_multiple_of(8), 0);
                offset += bytes.len().next_multiple_of(8);
                at as u64
            };
            for (kind, flags, address, bytes, size) in &self.programs {
                let at = add(bytes);
                headers.extend(kind.to_le_bytes());
                headers.extend(flags.to_le_bytes());
                let len = bytes.len() as u64;
                headers.extend(words(&[at, *address, *address, len, *size, 0x1000]));
            }
            let config_at = add(&self.config);
            let names_at = add(names);
            let mut sections = vec![0; 64];
            for (name, kind, at, len) in
                [(1u32, 1u32, config_at, self.config.len()), (20, 3, names_at, names.len())]
            {
                sections.extend(name.to_le_bytes());
                sections.extend(kind.to_le_bytes());
                sections.extend(words(&[0, 0, at, len as u64, 0, 1, 0]));
            }
            let sections_at = add(&sections);

            let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
            file.extend(self.kind.to_le_bytes());
            file.extend(self.machine.to_le_bytes());
            file.extend(1u32.to_le_bytes());
            file.extend(words(&[self.entry, 64, sections_at]));
            file.extend(0u32.to_le_bytes());
            for half in [64, 56, count as u16, 64, 3, 2] {
                file.extend(half.to_le_bytes());
            }
            file.extend(headers);
            file.extend(contents);
            file
        }
    }

    pub fn words(words: &[u64]) -> Vec<u8> {
        words.iter().flat_map(|word| word.to_le_bytes()).collect()
    }

    fn error(change: impl Fn(&mut Elf)) -> Error {
        changed(Elf::sound(), change)
    }

    fn changed(mut elf: Elf, change: impl Fn(&mut Elf)) -> Error {
        change(&mut elf);
        Kernel::parse(&elf.bytes()).unwrap_err()
    }

    #[test]
    fn a_sound_kernel() {
        let file = Elf::sound().bytes();
        let kernel = Kernel::parse(&file).unwrap();
        assert_eq!(kernel.config, BootloaderConfig::new_default());
        assert_eq!(kernel.entry, BASE + 0x2010);
        assert!(!kernel.position_independent);
        let found: Vec<_> =
            kernel.segments.iter().map(|s| (s.address, s.data.len(), s.size, s.access)).collect();
        let expected = [
            (BASE, 0x1800, 0x1800, Access::ReadOnly),
            (BASE + 0x2000, 0x100, 0x100, Access::Execute),
            (BASE + 0x3f00, 0x200, 0x2000, Access::ReadWrite),
        ];
        assert_eq!(found, expected);
        assert_eq!(kernel.span(), (BASE, 0x6000));
        assert_eq!(kernel.segments[2].page_bytes(), 0x3000);
        assert!(kernel.relocated(0).next().is_none());
    }

    #[test]
    fn headers_that_say_something_else() {
        let cases: [(Change, &str); 3] = [
            (|e| e.machine = 3, "it is not for x86-64"),
            (|e| e.kind = 1, "it is neither an executable nor position-independent"),
            (|e| e.entry = BASE, "its entry point is not in an executable segment"),
        ];
        for (change, why) in cases {
            assert_eq!(error(change), Error::BadElf(why));
        }
        assert_eq!(error(|e| e.entry = BASE + 0x2100), error(|e| e.entry = 0));
        for (at, value) in [(0, 0), (4, 1), (5, 2), (6, 9)] {
            let mut file = Elf::sound().bytes();
            file[at] = value;
            assert!(matches!(Kernel::parse(&file), Err(Error::Elf(_))), "byte {at}");
        }
    }

    #[test]
    fn segments_that_cannot_be() {
        let cases: [(usize, Change, &str); 6] = [
            (2, |e| e.programs[2].1 = R | W | X, "it is both writable and executable"),
            (1, |e| e.programs[1].4 = 0xff, "it is larger in the file than in memory"),
            (1, |e| e.programs[1].2 = BASE + 0x1800, "it shares a page with another one"),
            (2, |e| e.programs[2].4 = u64::MAX - BASE, "it wraps around the address space"),
            (
                3,
                |e| e.programs.push((3, R, 0, b"/ld\0".to_vec(), 4)),
                "it asks for a dynamic linker",
            ),
            (
                MAX_SEGMENTS,
                |e| {
                    e.programs.truncate(2);
                    let more = (0..MAX_SEGMENTS as u64).map(|i| (LOAD, R, i * PAGE, vec![], 1));
                    e.programs.extend(more);
                },
                "there are too many",
            ),
        ];
        for (index, change, why) in cases {
            assert_eq!(error(change), Error::BadSegment { index, why });
        }
        // Segments that wrap nothing but touch each other's page in the other order.
        assert!(matches!(
            error(|e| e.programs[0].2 = BASE + 0x2100),
            Error::BadSegment { index: 1, .. }
        ));
    }

    #[test]
    fn bytes_that_are_missing() {
        let file = Elf::sound().bytes();
        for len in 0..file.len() {
            assert!(Kernel::parse(&file[..len]).is_err(), "cut to {len}");
        }
        let mut file = file;
        // Offset of the second segment's bytes: behind the end, then wrapping.
        for offset in [file.len() as u64, u64::MAX - 8] {
            file[64 + 56 + 8..][..8].copy_from_slice(&offset.to_le_bytes());
            let missing = Error::BadSegment { index: 1, why: "its bytes are missing" };
            assert_eq!(Kernel::parse(&file).unwrap_err(), missing);
        }
    }

    #[test]
    fn configurations_of_others() {
        let version = Error::BadConfig("it is not of the bootloader_api version of this loader");
        assert_eq!(error(|e| e.config[18] ^= 1), version);
        assert_eq!(error(|e| e.config[20] ^= 1), version);
        assert_eq!(error(|e| e.config[0] ^= 1), version);
        assert_eq!(error(|e| e.config.push(0)), version);
        assert_eq!(error(|e| e.config.clear()), version);
        assert_eq!(error(|e| e.config[31] = 7), Error::BadConfig("invalid mapping value"));
        let mut file = Elf::sound().bytes();
        let name = file.windows(11).position(|w| w == b".bootloader").unwrap();
        file[name] = b'_';
        assert!(matches!(Kernel::parse(&file), Err(Error::BadConfig(why)) if why.contains("none")));
    }

    #[test]
    fn relocations() {
        let file = Elf::relocatable().bytes();
        let kernel = Kernel::parse(&file).unwrap();
        assert!(kernel.position_independent);
        let words: Vec<_> = kernel.relocated(0x1_0000).collect();
        assert_eq!(words, [Ok((2, 0x100, 0x1_2010))]);

        let relocated = |change: Change| {
            let mut elf = Elf::relocatable();
            change(&mut elf);
            let file = elf.bytes();
            let kernel = Kernel::parse(&file)?;
            kernel.relocated(0).collect::<Result<Vec<_>, _>>().map(|_| ())
        };
        let cases: [(Change, &str); 5] = [
            (|e| e.programs[0].3[8] = 1, "only R_X86_64_RELATIVE is known"),
            (|e| e.programs[0].3[1] = 0xf0, "the target is in no segment"),
            (|e| e.programs[3].3[24] = 23, "the table is cut off"),
            (|e| e.programs[3].3[10] = 1, "the table is in no segment"),
            (|e| e.programs[3].3[40] = 16, "the size of an entry is wrong"),
        ];
        for (change, why) in cases {
            assert_eq!(relocated(change), Err(Error::BadRelocation(why)));
        }
        // The last eight bytes of a segment can be relocated, one further not.
        assert_eq!(relocated(|e| e.programs[0].3[..2].copy_from_slice(&[0xf8, 0x5e])), Ok(()));
        assert!(relocated(|e| e.programs[0].3[..2].copy_from_slice(&[0xf9, 0x5e])).is_err());
        // Tables of other kinds: DT_REL, DT_RELR, DT_JMPREL, DT_NEEDED.
        for tag in [17, 36, 23, 1] {
            let refused = changed(Elf::relocatable(), |e| e.programs[3].3[0] = tag);
            let why = "it needs a dynamic linker";
            assert_eq!(refused, Error::BadSegment { index: 3, why });
        }
    }
}
