//! From the PVH entry to a guest's main function (Xen, `docs/misc/pvh.pandoc` and
//! `public/arch-x86/hvm/start_info.h`).

use core::arch::{asm, global_asm};
use core::{ptr, str};

use crate::area::{AREA_BYTES, FIRST};
use crate::exit::{self, Failure};
use crate::paging::{LARGE_PAGE, PAGE_TABLES, TABLE};
use crate::segments::{self, GDT, GDT_ENTRIES};
use crate::{console, println, trap};

// The note by which a loader knows the entry: owner, type 18 (XEN_ELFNOTE_PHYS32_ENTRY), the 32-bit
// physical address. The entry is in 32-bit protected mode with flat segments, paging off, EBX =
// address of the `hvm_start_info`.
global_asm!(
    r#"
    .pushsection .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18
    .asciz "Xen"
    .long pvh_entry
    .popsection

    .pushsection .text.pvh_entry, "ax"
    .code32
    .global pvh_entry
pvh_entry:
    cld
    mov esi, ebx
    lea esp, [{area} + {area_bytes}]

    // Level 4 -> level 3 -> five level 2 tables, the first four of them full of 2 MiB pages.
    mov dword ptr [{tables}], offset {tables} + 0x1000 + {table}
    mov edi, offset {tables} + 0x1000
    mov eax, offset {tables} + 0x2000 + {table}
2:  mov [edi], eax
    add edi, 8
    add eax, 0x1000
    cmp edi, offset {tables} + 0x1000 + 5 * 8
    jne 2b
    mov edi, offset {tables} + 0x2000
    mov eax, {large_page}
    // Few instructions, since each is a VM exit where the guest is traced.
2:
    .irp entry, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15
    mov [edi + 8 * \entry], eax
    add eax, 0x200000
    .endr
    add edi, 16 * 8
    cmp edi, offset {tables} + 0x6000
    jne 2b
    mov eax, offset {tables}
    mov cr3, eax

    // PAE, OSFXSR and OSXMMEXCPT: the compiled code uses SSE.
    mov eax, cr4
    or eax, 0x620
    mov cr4, eax

    // EFER.LME
    mov ecx, 0xC0000080
    rdmsr
    or eax, 0x100
    wrmsr

    // PG, NE, MP and PE on, EM and TS off.
    mov eax, cr0
    and eax, ~0xC
    or eax, 0x80000023
    mov cr0, eax

    lgdt [gdt_pointer]
    push {code}
    mov eax, offset long_mode
    push eax
    retf
gdt_pointer:
    .word {gdt_entries} * 8 - 1
    .long {gdt}

    .code64
long_mode:
    mov eax, {data}
    mov ds, eax
    mov es, eax
    mov ss, eax
    xor eax, eax
    mov fs, eax
    mov gs, eax
    mov esp, esp
    mov edi, esi
    call {start}
    ud2
    .popsection
    "#,
    tables = sym PAGE_TABLES,
    table = const TABLE,
    large_page = const LARGE_PAGE,
    gdt = sym GDT,
    code = const segments::code(0),
    data = const segments::data(0),
    area = sym FIRST,
    area_bytes = const AREA_BYTES,
    gdt_entries = const GDT_ENTRIES,
    start = sym start,
);

unsafe extern "C" {
    #[link_name = "image_end"]
    safe static IMAGE_END: u8;
}

/// First address behind the guest's image and all that it uses, in bytes.
pub fn image_end() -> u64 {
    &raw const IMAGE_END as u64
}

/// What the loader told.
pub struct Boot {
    /// First address behind the highest RAM, in bytes; 0 where the loader gave no memory map.
    pub memory_end: u64,
    text: [u8; 256],
    length: usize,
}

impl Boot {
    /// The command line, its first 256 bytes.
    pub fn command_line(&self) -> &str {
        str::from_utf8(&self.text[..self.length]).unwrap_or("")
    }

    /// Whether the command line has the word `name`.
    pub fn has(&self, name: &str) -> bool {
        self.command_line().split_ascii_whitespace().any(|word| word == name)
    }

    /// What stands behind `name=` in a word of the command line.
    pub fn value(&self, name: &str) -> Option<&str> {
        let mut words = self.command_line().split_ascii_whitespace();
        words.find_map(|word| word.strip_prefix(name)?.strip_prefix('='))
    }

    /// The decimal number of a word `name=number` of the command line.
    pub fn number(&self, name: &str) -> Option<u64> {
        self.value(name)?.parse().ok()
    }
}

/// `hvm_start_info`, version 1.
#[repr(C)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    modules: u32,
    module_list: u64,
    command_line: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<StartInfo>() == 56);

const MAGIC: u32 = 0x336E_C578;

/// `hvm_memmap_table_entry`.
#[repr(C)]
struct MemoryMapEntry {
    address: u64,
    bytes: u64,
    kind: u32,
    reserved: u32,
}

const _: () = assert!(size_of::<MemoryMapEntry>() == 24);

const RAM: u32 = 1;

/// Copies what the loader told, before any guest uses the memory that it stands in.
fn read_boot(info: u32) -> Option<Boot> {
    // SAFETY: the protocol puts a `StartInfo` there; all memory below 4 GiB is mapped, and its
    // fields take any value.
    let info = unsafe { ptr::read_unaligned(info as usize as *const StartInfo) };
    if info.magic != MAGIC {
        return None;
    }
    let mut boot = Boot { memory_end: 0, text: [0; 256], length: 0 };
    if info.version >= 1 {
        for index in 0..info.memory_map_entries as usize {
            // SAFETY: the table has that many entries.
            let entry = unsafe {
                ptr::read_unaligned((info.memory_map as *const MemoryMapEntry).add(index))
            };
            if entry.kind == RAM {
                boot.memory_end = boot.memory_end.max(entry.address + entry.bytes);
            }
        }
    }
    if info.command_line != 0 {
        for index in 0..boot.text.len() {
            // SAFETY: the text ends with a zero, and the loop at it.
            let byte = unsafe { (info.command_line as *const u8).add(index).read() };
            if byte == 0 {
                break;
            }
            boot.text[index] = byte;
            boot.length = index + 1;
        }
    }
    Some(boot)
}

unsafe extern "Rust" {
    /// What [`guest!`](crate::guest) defines.
    safe fn guest_main(boot: &Boot) -> Result<(), Failure>;
}

extern "C" fn start(info: u32) -> ! {
    segments::init(0);
    trap::init();
    console::init();
    let Some(boot) = read_boot(info) else {
        println!("no hvm_start_info at {info:#x}");
        exit::exit(exit::BAD_BOOT_INFO)
    };
    // The state that the initial x87 control word and MXCSR have after reset.
    // SAFETY: no floating-point code runs yet.
    unsafe { asm!("fninit", "ldmxcsr [{}]", in(reg) &0x1F80_u32, options(nostack)) };
    match guest_main(&boot) {
        Ok(()) => {
            println!("ok");
            exit::exit(exit::SUCCESS)
        }
        Err(failure) => exit::fail(failure),
    }
}
