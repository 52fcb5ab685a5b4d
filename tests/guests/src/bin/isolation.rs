//! Looks for anything beyond what a guest is given. Physical addresses behind its memory read as
//! all ones and ignore writes, up to the end of the address space; so do ports, those that reset or
//! switch off a PC among them; registers that no guest has raise #GP(0).
//!
//! With the word `edge` on the command line also an access that straddles the end of memory.
//!
//! Exit codes: success; 0x30 to 0x36, see the constants.

#![no_std]
#![no_main]

use core::arch::asm;

use guests::exit::Failure;
use guests::paging::window;
use guests::trap::Exception;
use guests::{Boot, cpu, guest, println};

guest!(main);

const NO_MEMORY_MAP: Failure = Failure::new(0x30, "no memory map: nothing says where memory ends");
const MEMORY_READ: Failure = Failure::new(0x31, "memory that is not there does not read as ones");
const MEMORY_WRITTEN: Failure = Failure::new(0x32, "memory that is not there was written");
const PORT_READ: Failure = Failure::new(0x33, "a port without a device does not read as ones");
const PORT_WRITTEN: Failure = Failure::new(0x34, "a port without a device was written");
const REGISTER: Failure = Failure::new(0x35, "a register that no guest has gave no #GP(0)");
const EDGE: Failure = Failure::new(0x36, "an access across the end of memory was not split");

/// Ports of a PC's reset, power, configuration, clock and keyboard, of emulators' power switches
/// and firmware, and some that are nothing anywhere.
const PORTS: [u16; 15] = [
    0x60, 0x64, 0x70, 0x71, 0x92, 0x402, 0x4F0, 0x510, 0x604, 0xCF8, 0xCF9, 0xCFC, 0x8900, 0xB004,
    0xFFF0,
];

/// Writes that reset or switch off a machine whose devices get them: port and value.
const KILLERS: [(u16, u16); 6] =
    [(0x64, 0xFE), (0x92, 0x01), (0xCF9, 0x06), (0xCF9, 0x0E), (0x604, 0x2000), (0xB004, 0x2000)];

/// The neighbour of 0x33, VMX capabilities, the last of and the first beyond each half of the MSR
/// bitmaps, a paravirtual one, arbitrary ones.
const REGISTERS: [u32; 9] =
    [0x32, 0x480, 0x491, 0x1FFF, 0x2000, 0x4B56_4D00, 0xC000_1FFF, 0xC000_2000, 0xDEAD_BEEF];

fn main(boot: &Boot) -> Result<(), Failure> {
    println!("memory ends at {:#x}", boot.memory_end);
    NO_MEMORY_MAP.unless(boot.memory_end != 0)?;
    memory(boot.memory_end)?;
    if boot.has("edge") {
        edge(boot.memory_end)?;
    }
    println!("ports");
    ports()?;
    println!("model-specific registers");
    for register in REGISTERS {
        let read = cpu::rdmsr(register);
        // SAFETY: if the write is taken the guest reports it and ends.
        let written = unsafe { cpu::wrmsr(register, 0) };
        if !(read.is_err_and(Exception::is_gp0) && written.is_err_and(Exception::is_gp0)) {
            println!("{register:#x}: read {read:x?}, written {written:x?}");
            return Err(REGISTER);
        }
    }
    Ok(())
}

fn memory(end: u64) -> Result<(), Failure> {
    let address_bits = (cpu::cpuid(0x8000_0008).eax & 0xFF).min(46);
    let powers = (20..address_bits).map(|bit| 1_u64 << bit).filter(|&address| address >= end);
    let edges = [end, end + 0xFF8, end + 0x1000, (1 << 32) - 8, (1 << address_bits) - 8];
    for address in edges.into_iter().chain(powers) {
        let at = window(address);
        let mut result = MEMORY_READ.unless(reads_ones(at));
        if result.is_ok() {
            write(at);
            result = MEMORY_WRITTEN.unless(reads_ones(at));
        }
        if result.is_err() {
            println!("at {address:#x}");
            return result;
        }
    }
    println!("nothing behind it");
    Ok(())
}

/// Reads one, two, four and eight bytes; whether all of them are ones.
fn reads_ones(at: *const u8) -> bool {
    let (mut one, mut two, mut four, mut eight) = (0_u64, 0_u64, 0_u64, 0_u64);
    // SAFETY: the window is mapped; what is behind it is the question.
    unsafe {
        asm!(
            "mov {one:l}, [{at}]",
            "mov {two:x}, [{at}]",
            "mov {four:e}, [{at}]",
            "mov {eight}, [{at}]",
            at = in(reg) at,
            one = inout(reg) one,
            two = inout(reg) two,
            four = inout(reg) four,
            eight = inout(reg) eight,
            options(nostack, preserves_flags),
        );
    }
    (one, two, four, eight) == (0xFF, 0xFFFF, 0xFFFF_FFFF, u64::MAX)
}

/// Writes one, two, four and eight bytes.
fn write(at: *mut u8) {
    // SAFETY: no memory of the guest is there.
    unsafe {
        asm!(
            "mov [{at}], {value:l}",
            "mov [{at}], {value:x}",
            "mov [{at}], {value:e}",
            "mov [{at}], {value}",
            "mov dword ptr [{at}], 0x12345678",
            at = in(reg) at,
            value = in(reg) 0_u64,
            options(nostack, preserves_flags),
        );
    }
}

/// Four bytes in the last page of memory, four behind it.
fn edge(end: u64) -> Result<(), Failure> {
    let at = (end - 4) as *mut u8;
    let mut value = 0x1122_3344_5566_7788_u64;
    // SAFETY: the runtime does not use the last bytes of memory.
    unsafe {
        asm!(
            "mov [{at}], {value}",
            "mov {value}, [{at}]",
            at = in(reg) at,
            value = inout(reg) value,
            options(nostack, preserves_flags),
        );
    }
    EDGE.unless(value == 0xFFFF_FFFF_5566_7788)
}

fn ports() -> Result<(), Failure> {
    let ones = |port| {
        // SAFETY: reading a port that answers has no effect that this guest would mind.
        unsafe { (cpu::in8(port), cpu::in16(port), cpu::in32(port)) == (0xFF, 0xFFFF, 0xFFFF_FFFF) }
    };
    let all_ones = |failure: Failure| {
        for port in PORTS {
            if !ones(port) {
                println!("port {port:#x}");
                return Err(failure);
            }
        }
        Ok(())
    };
    all_ones(PORT_READ)?;
    // SAFETY: should one of these work, then the machine is gone, and that is seen.
    unsafe {
        for port in PORTS {
            cpu::out8(port, 0);
            cpu::out16(port, 0);
            cpu::out32(port, 0x8000_0000);
        }
        for (port, value) in KILLERS {
            cpu::out8(port, value as u8);
            cpu::out16(port, value);
        }
        for byte in b"Shutdown" {
            cpu::out8(0x8900, *byte);
        }
    }
    all_ones(PORT_WRITTEN)
}
