//! The BIOS, as 64-bit code can use it.
//!
//! The assembly brings the machine from the boot record into 64-bit mode with the first 4 GiB
//! identity-mapped, and goes back to real mode for each call. The addresses of the loader's parts
//! are laid down in `bios.ld`.

pub mod a20;
pub mod clock;
pub mod console;
pub mod disk;
pub mod exceptions;
pub mod keyboard;
pub mod memory;
pub mod restart;
pub mod screen;

use core::{arch::global_asm, cell::UnsafeCell};

global_asm!(include_str!("mbr.s"), options(att_syntax));
global_asm!(include_str!("modes.s"), options(att_syntax));

// Tells cargo to link again when the linker script has changed.
const _: &str = include_str!("../../bios.ld");

/// General registers, segments and flags at a call and after it.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub struct Registers {
    pub eax: u32,
    pub ebx: u32,
    pub ecx: u32,
    pub edx: u32,
    pub esi: u32,
    pub edi: u32,
    pub ebp: u32,
    pub ds: u16,
    pub es: u16,
    /// Only what the call returns.
    pub flags: u16,
}

impl Registers {
    /// Whether the call reported an error by the carry flag.
    pub fn carry(&self) -> bool {
        self.flags & 1 != 0
    }

    /// Whether the call set the zero flag.
    pub fn zero(&self) -> bool {
        self.flags & 1 << 6 != 0
    }

    /// The status that disk services return.
    pub fn ah(&self) -> u8 {
        self.eax.to_le_bytes()[1]
    }
}

unsafe extern "sysv64" {
    fn bios_call();
    fn put_handler();
    static mut bios_registers: Registers;
    static mut bios_target: u32;
    static boot_drive: u8;
    static disk_table: [u8; boot::disk::Table::SIZE];
    /// The lowest word of the stack.
    static mut stack_bottom: u64;
}

/// Stands at the bottom of the stack, where it never gets if it is large enough.
const STACK_MARK: u64 = u64::from_le_bytes(*b"untaken\n");

/// Marks the bottom of the stack.
pub fn mark_stack() {
    // SAFETY: the stack is far from full.
    unsafe { (&raw mut stack_bottom).write_volatile(STACK_MARK) }
}

/// Whether the stack has never been full.
pub fn stack_was_enough() -> bool {
    // SAFETY: it is memory of the loader.
    unsafe { (&raw const stack_bottom).read_volatile() == STACK_MARK }
}

/// Calls software interrupt `vector` of the BIOS.
///
/// # Safety
///
/// With `registers`, the service must write only to memory that the loader set aside for it.
unsafe fn call(vector: u8, registers: &mut Registers) {
    let entry = usize::from(vector) * 4;
    // SAFETY: the real-mode interrupt table is at address 0 and the loader leaves it alone.
    let target = unsafe { (entry as *const u32).read_volatile() };
    // SAFETY: the service behind the vector keeps to what the caller promised.
    unsafe { call_at(target, registers) }
}

/// Calls the real-mode interrupt handler at `target` (segment in the upper half).
///
/// # Safety
///
/// There is a handler; for the rest see [`call`].
unsafe fn call_at(target: u32, registers: &mut Registers) {
    // SAFETY: 1. One CPU, and interrupt handlers of the BIOS do not use these variables. 2. The
    // assembly keeps what the ABI says must be kept. 3. The handler does what the caller promised.
    unsafe {
        (&raw mut bios_target).write(target);
        (&raw mut bios_registers).write(*registers);
        bios_call();
        *registers = (&raw const bios_registers).read();
    }
}

/// The drive number that the BIOS gave to the boot record.
pub fn drive() -> u8 {
    // SAFETY: the boot record wrote it before any Rust code ran.
    unsafe { (&raw const boot_drive).read() }
}

/// Where the files are; `None` if no image builder said.
pub fn table() -> Option<boot::disk::Table> {
    // SAFETY: read from the disk before any Rust code ran.
    boot::disk::Table::decode(unsafe { &disk_table })
}

/// KiB of memory from address 0 on that the BIOS does not use itself (INT 12h).
pub fn conventional_memory() -> u32 {
    let mut registers = Registers::default();
    // SAFETY: the service writes no memory.
    unsafe { call(0x12, &mut registers) };
    registers.eax & 0xffff
}

/// A buffer in low memory through which one BIOS service at a time gets and gives structures.
#[repr(C, align(16))]
struct Scratch(UnsafeCell<[u8; Self::SIZE]>);

// SAFETY: there is one CPU, and interrupt handlers do not use it.
unsafe impl Sync for Scratch {}

static SCRATCH: Scratch = Scratch(UnsafeCell::new([0; Scratch::SIZE]));

impl Scratch {
    /// What the largest of these structures needs.
    const SIZE: usize = 512;

    /// Fills it with `bytes`, then zeros; returns segment and offset.
    fn put(&self, bytes: &[u8]) -> (u16, u16) {
        let mut all = [0; Self::SIZE];
        all[..bytes.len()].copy_from_slice(bytes);
        // SAFETY: no reference to the contents exists outside these two methods.
        unsafe { self.0.get().write(all) };
        real_address(self.0.get() as usize)
    }

    /// The first bytes of it.
    fn get<const N: usize>(&self) -> [u8; N] {
        const { assert!(N <= Self::SIZE) };
        // SAFETY: see `put`; any bytes are valid.
        unsafe { self.0.get().cast::<[u8; N]>().read() }
    }
}

/// Segment and offset of an address below 1 MiB.
fn real_address(address: usize) -> (u16, u16) {
    ((address >> 4) as u16, (address & 15) as u16)
}
