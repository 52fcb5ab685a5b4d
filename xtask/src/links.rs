//! Checks of what was linked for the bare machine: that nothing is both writable and executable, and that no code keeps
//! data below its stack pointer.
//!
//! The latter is the red zone: 128 bytes below RSP that the System V ABI lets a function use which calls no other. An
//! interrupt that arrives on the same stack overwrites them. Our crates are compiled without it; the precompiled `core`
//! and `alloc` use it.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use iced_x86::{Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic, OpKind, Register};
use object::elf::{FileHeader64, PF_W, PF_X, PT_LOAD, SHF_EXECINSTR};
use object::pe::{IMAGE_DLLCHARACTERISTICS_NX_COMPAT, IMAGE_SCN_MEM_EXECUTE, IMAGE_SCN_MEM_WRITE};
use object::read::archive::ArchiveFile;
use object::read::elf::{ElfFile64, FileHeader, ProgramHeader};
use object::read::pe::{ImageNtHeaders, ImageOptionalHeader, PeFile64};
use object::{LittleEndian, Object, ObjectSection, ObjectSymbol, SectionFlags};

use crate::{console, pe};

/// What may interrupt a part's code, which decides who in it may use the red zone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stacks {
    /// Interrupts and exceptions arrive on the stack of the code that they interrupt. Nobody may.
    Shared,
    /// Each has a stack of its own (every gate of the IDT uses the IST). Only precompiled code may.
    Separate,
}

/// The kernel, an ELF file.
///
/// # Errors
/// What is wrong with it, and where.
pub fn check_kernel(file: &Path) -> Result<()> {
    check_elf(file, Stacks::Separate, &[])
}

/// A test guest, an ELF file: its rights. Some of its code is 16-bit and 32-bit code, which has no red zone
/// and would be misread.
///
/// # Errors
/// What is wrong with it, and where.
pub fn check_guest(file: &Path) -> Result<()> {
    check_segments(file, &read(file)?)
}

/// The UEFI stage of the loader: the ELF file that it is linked as, and the PE file made of that.
///
/// # Errors
/// What is wrong with them, and where.
pub fn check_uefi_stage(file: &Path) -> Result<()> {
    check_elf(file, Stacks::Shared, &[])?;
    let check = || check_pe(&pe::from_elf(&read(file)?)?);
    check().with_context(|| format!("{}", file.display()))
}

/// The BIOS stage of the loader, an ELF file.
///
/// It is the one part that is both writable and executable: the boot record loads it in one piece, and real mode knows
/// no rights. Its real-mode code has no red zone: the ABI that has one is that of 64-bit code.
///
/// # Errors
/// What is wrong with it, and where.
pub fn check_bios_stage(file: &Path) -> Result<()> {
    let in_file = || format!("{}", file.display());
    let data = read(file)?;
    let segments = segments(&data).with_context(in_file)?;
    let [Segment { start: BOOT_RECORD, .. }] = segments[..] else {
        bail!("{}: it is not one segment at {BOOT_RECORD:#x}: {segments:x?}", in_file());
    };
    check_red_zone(&data, Stacks::Shared, &REAL_MODE).with_context(in_file)
}

/// Where the BIOS puts the boot record.
const BOOT_RECORD: u64 = 0x7c00;
/// The BIOS stage's sections of real-mode code.
const REAL_MODE: [&str; 3] = [".mbr", ".table", ".real"];

fn read(file: &Path) -> Result<Vec<u8>> {
    fs::read(file).with_context(|| format!("cannot read {}", file.display()))
}

fn check_elf(file: &Path, stacks: Stacks, left_out: &[&str]) -> Result<()> {
    let data = read(file)?;
    check_segments(file, &data)?;
    check_red_zone(&data, stacks, left_out).with_context(|| format!("{}", file.display()))
}

fn check_segments(file: &Path, data: &[u8]) -> Result<()> {
    let check = || check_rights(&segments(data)?);
    check().with_context(|| format!("{}", file.display()))
}

/// A part of a program with rights of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Segment {
    start: u64,
    writable: bool,
    executable: bool,
}

/// What an ELF file has loaded.
fn segments(elf: &[u8]) -> Result<Vec<Segment>> {
    let header = FileHeader64::<LittleEndian>::parse(elf)?;
    let programs = header.program_headers(LittleEndian, elf)?;
    let loaded = programs.iter().filter(|program| program.p_type(LittleEndian) == PT_LOAD);
    let segment = |program: &object::elf::ProgramHeader64<LittleEndian>| Segment {
        start: program.p_vaddr(LittleEndian),
        writable: program.p_flags(LittleEndian).contains(PF_W),
        executable: program.p_flags(LittleEndian).contains(PF_X),
    };
    Ok(loaded.map(segment).collect())
}

fn check_rights(segments: &[Segment]) -> Result<()> {
    ensure!(segments.iter().any(|segment| segment.executable), "nothing in it is executable");
    match segments.iter().find(|segment| segment.writable && segment.executable) {
        Some(Segment { start, .. }) => {
            bail!("what is linked at {start:#x} is both writable and executable")
        }
        None => Ok(()),
    }
}

/// Firmware that gives the sections of a PE file their rights does so if the file says that it can live with that.
fn check_pe(data: &[u8]) -> Result<()> {
    let file = PeFile64::parse(data)?;
    let segment = |section: object::read::pe::PeSection64<'_, '_>| {
        let SectionFlags::Coff { characteristics } = section.flags() else { return None };
        Some(Segment {
            start: section.address(),
            writable: characteristics.contains(IMAGE_SCN_MEM_WRITE),
            executable: characteristics.contains(IMAGE_SCN_MEM_EXECUTE),
        })
    };
    check_rights(&file.sections().filter_map(segment).collect::<Vec<_>>())?;
    let header = file.nt_headers().optional_header();
    ensure!(
        header.dll_characteristics().contains(IMAGE_DLLCHARACTERISTICS_NX_COMPAT),
        "it is not marked NX_COMPAT: firmware would leave all of it executable"
    );
    let page = header.section_alignment();
    ensure!(page.is_multiple_of(0x1000), "its sections are aligned to {page:#x}, not to pages");
    Ok(())
}

/// An access below the stack pointer.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Use {
    function: String,
    address: u64,
}

impl fmt::Display for Use {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:#x} in {:#}",
            self.address,
            addr2line::demangle_auto((&*self.function).into(), None)
        )
    }
}

fn check_red_zone(elf: &[u8], stacks: Stacks, left_out: &[&str]) -> Result<()> {
    let allowed = match stacks {
        Stacks::Shared => BTreeSet::new(),
        Stacks::Separate => precompiled()?,
    };
    judge(&uses(elf, left_out)?, &allowed)
}

fn judge(uses: &[Use], allowed: &BTreeSet<String>) -> Result<()> {
    let wrong = uses.iter().filter(|found| !allowed.contains(&found.function));
    let shown: String = wrong.map(|found| format!("\n  {found}")).collect();
    ensure!(
        shown.is_empty(),
        "data below the stack pointer, where interrupts overwrite it:{shown}"
    );
    Ok(())
}

/// Names of the functions that come compiled with the toolchain.
fn precompiled() -> Result<BTreeSet<String>> {
    let output = console::capture(Command::new("rustc").args(["--print", "target-libdir"]))?;
    ensure!(output.status.success(), "rustc does not tell where its libraries are");
    let directory = String::from_utf8(output.stdout)?;
    let directory = Path::new(directory.trim());
    let mut names = BTreeSet::new();
    for entry in fs::read_dir(directory).with_context(|| format!("{}", directory.display()))? {
        let file = entry?.path();
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let wanted = ["libcore-", "liballoc-", "libcompiler_builtins-"];
        if name.ends_with(".rlib") && wanted.iter().any(|library| name.starts_with(library)) {
            let data = read(&file)?;
            add_functions(&data, &mut names).with_context(|| format!("{}", file.display()))?;
        }
    }
    ensure!(!names.is_empty(), "{} has no libraries", directory.display());
    Ok(names)
}

/// Adds the names of the functions in a static library.
fn add_functions(library: &[u8], names: &mut BTreeSet<String>) -> Result<()> {
    let archive = ArchiveFile::parse(library)?;
    for member in archive.members() {
        // Metadata is in it too.
        if let Ok(file) = ElfFile64::<LittleEndian>::parse(member?.data(library)?) {
            let functions = file.symbols().filter(|symbol| symbol.is_definition());
            names.extend(functions.filter_map(|symbol| Some(symbol.name().ok()?.to_owned())));
        }
    }
    Ok(())
}

/// All uses of the red zone in the executable sections but those that are left out.
fn uses(elf: &[u8], left_out: &[&str]) -> Result<Vec<Use>> {
    let file = ElfFile64::<LittleEndian>::parse(elf)?;
    let mut functions: BTreeMap<u64, (u64, &str)> = BTreeMap::new();
    for symbol in file.symbols().filter(|symbol| symbol.kind() == object::SymbolKind::Text) {
        // Those without a size are written in assembly, without a red zone, and perhaps not 64-bit code.
        if symbol.size() != 0 {
            functions.insert(symbol.address(), (symbol.size(), symbol.name()?));
        }
    }
    let mut found = Vec::new();
    let mut any = false;
    for section in file.sections() {
        let SectionFlags::Elf { sh_flags, .. } = section.flags() else { continue };
        let executable = sh_flags.contains(SHF_EXECINSTR);
        if !executable || left_out.contains(&section.name()?) {
            continue;
        }
        let (code, start) = (section.data()?, section.address());
        for (address, (size, name)) in functions.range(start..start + code.len() as u64) {
            let bytes = code[(address - start) as usize..].get(..*size as usize);
            let bytes = bytes.with_context(|| format!("{name} is longer than its section"))?;
            let of_function = Function::decode(*address, bytes).uses();
            any = true;
            found.extend(
                of_function
                    .into_iter()
                    .map(|address| Use { function: (*name).to_owned(), address }),
            );
        }
    }
    // Without symbols, nothing would ever be found.
    ensure!(any, "it has no symbols of functions");
    Ok(found)
}

/// What is known of the stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct State {
    /// Where the stack pointer stands: bytes below where it stood at the function's start. `None` is unknown.
    depth: Option<i64>,
    /// The same of RBP.
    frame: Option<i64>,
    /// Whether the function has made room on the stack, other than by PUSH.
    room: bool,
}

impl State {
    const START: Self = Self { depth: Some(0), frame: None, room: false };
    const UNKNOWN: Self = Self { depth: None, frame: None, room: false };

    /// What is known on both of two ways.
    fn join(self, other: Self) -> Self {
        let both = |a: Option<i64>, b| a.filter(|_| a == b);
        Self {
            depth: both(self.depth, other.depth),
            frame: both(self.frame, other.frame),
            room: self.room || other.room,
        }
    }
}

/// A function's instructions, in order.
struct Function {
    instructions: Vec<Instruction>,
}

impl Function {
    fn decode(address: u64, code: &[u8]) -> Self {
        let decoder = Decoder::with_ip(64, code, address, DecoderOptions::NONE);
        Self { instructions: decoder.into_iter().collect() }
    }

    /// Addresses of the instructions that reach below the stack pointer.
    fn uses(&self) -> Vec<u64> {
        let pairs = self.instructions.iter().zip(self.states());
        let reaching = pairs.filter(|(instruction, state)| reaches_below(instruction, *state));
        reaching.map(|(instruction, _)| instruction.ip()).collect()
    }

    fn index_of(&self, address: u64) -> Option<usize> {
        self.instructions.binary_search_by_key(&address, Instruction::ip).ok()
    }

    /// What is known before each instruction.
    fn states(&self) -> Vec<State> {
        let mut states = vec![None; self.instructions.len()];
        self.follow(0, State::START, &mut states);
        // Where a jump by a table leads, the stack is as it was before.
        let jumps: Vec<State> = (0..self.instructions.len())
            .filter(|index| self.instructions[*index].flow_control() == FlowControl::IndirectBranch)
            .filter_map(|index| states[index])
            .collect();
        let behind = jumps.into_iter().reduce(State::join).unwrap_or(State::UNKNOWN);
        for index in 0..states.len() {
            if states[index].is_none() {
                self.follow(index, behind, &mut states);
            }
        }
        states.into_iter().map(|state| state.unwrap_or(State::UNKNOWN)).collect()
    }

    /// Follows all ways from an instruction on. Each visit knows less than the one before, so it comes to an end.
    fn follow(&self, start: usize, state: State, states: &mut [Option<State>]) {
        let mut to_do = vec![(start, state)];
        while let Some((index, state)) = to_do.pop() {
            let Some(instruction) = self.instructions.get(index) else { continue };
            let known = states[index].map_or(state, |before| before.join(state));
            if states[index] == Some(known) {
                continue;
            }
            states[index] = Some(known);
            let after = after(instruction, known);
            let target = || self.index_of(instruction.near_branch_target());
            match instruction.flow_control() {
                FlowControl::UnconditionalBranch => to_do.extend(target().map(|to| (to, after))),
                FlowControl::ConditionalBranch => {
                    to_do.extend(target().map(|to| (to, after)));
                    to_do.push((index + 1, after));
                }
                FlowControl::IndirectBranch | FlowControl::Return | FlowControl::Exception => {}
                _ => to_do.push((index + 1, after)),
            }
        }
    }
}

/// What is known after an instruction.
fn after(instruction: &Instruction, State { depth, frame, room }: State) -> State {
    let is_register = |operand: u32, register: Register| {
        instruction.op_count() > operand
            && instruction.op_kind(operand) == OpKind::Register
            && instruction.op_register(operand).full_register() == register
    };
    let immediate = (instruction.op_count() == 2).then(|| instruction.try_immediate(1).ok());
    let immediate = immediate.flatten().map(|value| value as i64);
    let displacement = instruction.memory_displacement64() as i64;
    let from = |base: Option<i64>| {
        base.filter(|_| instruction.memory_index() == Register::None)
            .map(|base| base - displacement)
    };
    let addressed = match instruction.memory_base() {
        Register::RSP => from(depth),
        Register::RBP => from(frame),
        _ => None,
    };
    let writes = |register| {
        let reads_only =
            matches!(instruction.mnemonic(), Mnemonic::Cmp | Mnemonic::Test | Mnemonic::Push);
        is_register(0, register) && !reads_only
    };
    let assigned = match instruction.mnemonic() {
        Mnemonic::Mov if is_register(1, Register::RSP) => depth,
        Mnemonic::Mov if is_register(1, Register::RBP) => frame,
        Mnemonic::Lea => addressed,
        _ => None,
    };
    let depth = match (instruction.mnemonic(), instruction.flow_control()) {
        (Mnemonic::Leave, _) => frame.map(|frame| frame - 8),
        (Mnemonic::Sub, _) if writes(Register::RSP) => depth.zip(immediate).map(|(a, b)| a + b),
        (Mnemonic::Add, _) if writes(Register::RSP) => depth.zip(immediate).map(|(a, b)| a - b),
        // Aligning makes more room.
        (Mnemonic::And, _) if writes(Register::RSP) => depth,
        _ if writes(Register::RSP) => assigned,
        // What is called comes back with the stack as it was.
        (_, FlowControl::Call | FlowControl::IndirectCall | FlowControl::Interrupt) => depth,
        _ => depth.map(|depth| depth - i64::from(instruction.stack_pointer_increment())),
    };
    let frame = match instruction.mnemonic() {
        Mnemonic::Leave => None,
        _ if writes(Register::RBP) => assigned,
        _ => frame,
    };
    State { depth, frame, room: room || writes(Register::RSP) }
}

/// Whether an operand of the instruction lies below the stack pointer.
///
/// An address that is only computed, and one with an index, count as if they were used as they are, unless the function
/// has made room on the stack: compilers let such an address begin below an array of which the first element is not used.
fn reaches_below(instruction: &Instruction, State { depth, frame, room }: State) -> bool {
    let has_operand = instruction.op_kinds().any(|kind| kind == OpKind::Memory);
    let computed = instruction.mnemonic() == Mnemonic::Lea;
    let moves_stack = computed && instruction.op0_register().full_register() == Register::RSP;
    let indexed = instruction.memory_index() != Register::None;
    let used_otherwise = room && (computed || indexed);
    if !has_operand || moves_stack || used_otherwise || instruction.mnemonic() == Mnemonic::Nop {
        return false;
    }
    let displacement = instruction.memory_displacement64() as i64;
    match instruction.memory_base().full_register() {
        Register::RSP => displacement < 0,
        Register::RBP => {
            frame.zip(depth).is_some_and(|(frame, depth)| frame - displacement > depth)
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Where the functions of these tests stand.
    const START: u64 = 0x1000;

    /// Offsets of the instructions that reach below the stack pointer.
    fn offsets(code: &[u8]) -> Vec<u64> {
        Function::decode(START, code).uses().iter().map(|address| address - START).collect()
    }

    #[test]
    fn red_zone_by_the_stack_pointer() {
        assert_eq!(offsets(&[0x48, 0x89, 0x7c, 0x24, 0xf8, 0xc3]), [0], "mov [rsp-8], rdi; ret");
        let lea = [0x90, 0x48, 0x8d, 0x44, 0x24, 0x80, 0xc3];
        assert_eq!(offsets(&lea), [1], "nop; lea rax, [rsp-0x80]; ret");
        let indexed = [0x88, 0x44, 0x3c, 0x80, 0xc3];
        assert_eq!(offsets(&indexed), [0], "mov [rsp+rdi-0x80], al; ret");
        // Also where nothing leads to it.
        assert_eq!(offsets(&[0x0f, 0x0b, 0x8b, 0x44, 0x24, 0xfc]), [2], "ud2; mov eax, [rsp-4]");
    }

    #[test]
    fn red_zone_by_a_frame_pointer() {
        // push rbp; mov rbp, rsp; mov [rbp-8], rdi; pop rbp; ret
        let leaf = [0x55, 0x48, 0x89, 0xe5, 0x48, 0x89, 0x7d, 0xf8, 0x5d, 0xc3];
        assert_eq!(offsets(&leaf), [4]);
        // push rbp; mov rbp, rsp; push rbx; mov [rbp-8], rdi; mov [rbp-16], rdi; pop rbx; pop rbp; ret
        let one_pushed = [
            0x55, 0x48, 0x89, 0xe5, 0x53, 0x48, 0x89, 0x7d, 0xf8, 0x48, 0x89, 0x7d, 0xf0, 0x5b,
            0x5d, 0xc3,
        ];
        assert_eq!(offsets(&one_pushed), [9]);
        // push rbp; mov rbp, rsp; sub rsp, 16; add rsp, 16; mov [rbp-8], rdi; pop rbp; ret
        let given_back = [
            0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x10, 0x48, 0x83, 0xc4, 0x10, 0x48, 0x89,
            0x7d, 0xf8, 0x5d, 0xc3,
        ];
        assert_eq!(offsets(&given_back), [12]);
    }

    #[test]
    fn what_is_above_the_stack_pointer_is_not_the_red_zone() {
        for (code, what) in [
            (
                &[0x48, 0x83, 0xec, 0x08, 0x48, 0x89, 0x3c, 0x24, 0x58, 0xc3][..],
                "sub rsp; mov [rsp]",
            ),
            (&[0x48, 0x8d, 0x64, 0x24, 0x80, 0xc3], "lea rsp, [rsp-0x80]"),
            (&[0x57, 0x5f, 0xe8, 0, 0, 0, 0, 0xc3], "push; pop; call; ret"),
            (&[0x48, 0x83, 0xec, 0x40, 0x88, 0x44, 0x3c, 0xff], "sub rsp, 64; mov [rsp+rdi-1], al"),
            (
                &[0x48, 0x83, 0xec, 0x40, 0x48, 0x8d, 0x44, 0x24, 0xff],
                "sub rsp, 64; lea rax, [rsp-1]",
            ),
            (&[0x48, 0x89, 0x7d, 0xf8, 0xc3], "mov [rbp-8], rdi: RBP is the caller's"),
            (
                &[
                    0x55, 0x48, 0x89, 0xe5, 0x48, 0x83, 0xec, 0x10, 0x48, 0x89, 0x7d, 0xf8, 0xc9,
                    0xc3,
                ],
                "push rbp; mov rbp, rsp; sub rsp, 16; mov [rbp-8], rdi; leave; ret",
            ),
            (
                // je over the epilogue of the other way.
                &[
                    0x55, 0x48, 0x89, 0xe5, 0x53, 0x74, 0x03, 0x5b, 0x5d, 0xc3, 0x48, 0x89, 0x7d,
                    0xf8, 0x5b, 0x5d, 0xc3,
                ],
                "push rbp; mov rbp, rsp; push rbx; je 1f; pop rbx; pop rbp; ret; 1: mov [rbp-8], rdi; ...",
            ),
        ] {
            assert_eq!(offsets(code), [0; 0], "{what}");
        }
    }

    #[test]
    fn a_jump_by_a_table_leaves_the_stack_as_it_is() {
        // push rbp; mov rbp, rsp; push rbx; jmp rax; mov [rbp-8], rdi; mov [rbp-16], rdi
        let code = [
            0x55, 0x48, 0x89, 0xe5, 0x53, 0xff, 0xe0, 0x48, 0x89, 0x7d, 0xf8, 0x48, 0x89, 0x7d,
            0xf0,
        ];
        assert_eq!(offsets(&code), [11]);
    }

    #[test]
    fn nothing_may_be_writable_and_executable() {
        let segment = |writable, executable| Segment { start: 0x1000, writable, executable };
        assert!(check_rights(&[segment(true, false), segment(false, true)]).is_ok());
        assert!(check_rights(&[segment(false, true), segment(true, true)]).is_err());
        assert!(check_rights(&[segment(true, false)]).is_err());
    }

    /// The headers of a PE file with one section and without directories.
    fn pe_file(section_rights: u32, page: u32, nx_compat: bool) -> Vec<u8> {
        const COFF: usize = 0x44;
        const OPTIONAL: usize = COFF + 20;
        const SECTION: usize = OPTIONAL + 112;
        let mut file = vec![0; 0x200];
        let mut put = |at: usize, bytes: &[u8]| file[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, b"MZ");
        put(0x3c, &0x40u32.to_le_bytes());
        put(0x40, b"PE\0\0");
        // x86-64, one section, the size of the optional header.
        put(COFF, &0x8664u16.to_le_bytes());
        put(COFF + 2, &1u16.to_le_bytes());
        put(COFF + 16, &112u16.to_le_bytes());
        put(OPTIONAL, &0x20bu16.to_le_bytes());
        put(OPTIONAL + 32, &page.to_le_bytes());
        put(OPTIONAL + 70, &(u16::from(nx_compat) << 8).to_le_bytes());
        put(SECTION, b".text");
        put(SECTION + 12, &0x1000u32.to_le_bytes());
        put(SECTION + 36, &section_rights.to_le_bytes());
        file
    }

    #[test]
    fn pe_files_keep_their_rights_apart() {
        const EXECUTE: u32 = 1 << 29;
        const WRITE: u32 = 1 << 31;
        let check = |rights, page, nx| {
            let checked = check_pe(&pe_file(rights, page, nx));
            checked.err().map(|why| why.to_string()).unwrap_or_default()
        };
        assert_eq!(check(EXECUTE, 0x1000, true), "");
        let both = check(EXECUTE | WRITE, 0x1000, true);
        assert!(both.contains("0x1000 is both writable and executable"), "{both}");
        assert!(check(WRITE, 0x1000, true).contains("nothing in it is executable"));
        assert!(check(EXECUTE, 0x1000, false).contains("NX_COMPAT"));
        assert!(check(EXECUTE, 0x200, true).contains("0x200"));
    }

    #[test]
    fn only_precompiled_code_may_use_the_red_zone() {
        let precompiled = precompiled().unwrap();
        let of_core = precompiled.iter().find(|name| name.contains("4core3fmt")).unwrap();
        let by = |function: &str| Use { function: function.to_owned(), address: 0x1234 };
        assert!(judge(&[by(of_core)], &precompiled).is_ok());
        let why = judge(&[by(of_core), by("ours")], &precompiled).unwrap_err().to_string();
        assert!(why.ends_with("interrupts overwrite it:\n  0x1234 in ours"), "{why}");
        assert!(judge(&[by(of_core)], &BTreeSet::new()).is_err());
    }

    /// A program of the host is compiled with a red zone, and its segments have their rights.
    #[test]
    fn real_programs_are_read() {
        let program = fs::read(std::env::current_exe().unwrap()).unwrap();
        check_rights(&segments(&program).unwrap()).unwrap();
        let why = check_red_zone(&program, Stacks::Separate, &[]).unwrap_err().to_string();
        assert!(why.contains("xtask::"), "{why}");
        assert!(check_pe(&program).is_err());
    }
}
