//! What people see and press: the firmware's console while it is there, and the first serial port.

use core::{
    fmt::{self, Write},
    ptr,
    sync::atomic::{AtomicBool, Ordering},
    time::Duration,
};

use uefi::{
    Guid, Handle, Status,
    boot::{self, OpenProtocolAttributes, OpenProtocolParams, SearchType},
    guid,
    proto::device_path::{DevicePath, DeviceSubType, DeviceType},
    system,
};
use x86_64::instructions::{hlt, interrupts};

use crate::serial::Serial;

/// Marks the devices that the console writes to.
pub const CONSOLE_OUT_DEVICE: Guid = guid!("d3b36f2c-d551-11d4-9a46-0090273fc14d");

static FIRMWARE_IS_GONE: AtomicBool = AtomicBool::new(false);
static PANICKED: AtomicBool = AtomicBool::new(false);

/// From now on there are no boot services.
pub fn firmware_is_gone() {
    FIRMWARE_IS_GONE.store(true, Ordering::Relaxed);
}

fn has_firmware() -> bool {
    !FIRMWARE_IS_GONE.load(Ordering::Relaxed)
}

/// Says a line.
pub fn say(line: fmt::Arguments<'_>) {
    // What cannot be shown is lost.
    if has_firmware() {
        let _ = system::with_stdout(|console| writeln!(console, "boot: {line}"));
    }
    if !has_firmware() || !is_on_serial_port() {
        Serial.set_up();
        let _ = writeln!(Serial, "boot: {line}");
    }
}

/// Waits until a key is pressed from now on.
pub fn wait_for_key() {
    let event = system::with_stdin(|keyboard| {
        // Forgets what was pressed before.
        let _ = keyboard.reset(false);
        keyboard.wait_for_key_event()
    });
    if event.is_ok_and(|event| boot::wait_for_event(&[event]).is_ok()) {
        let _ = system::with_stdin(|keyboard| keyboard.read_key());
    } else {
        boot::stall(Duration::from_secs(30));
    }
}

/// Ends a panic in the panic's own messages.
pub fn first_panic() {
    if PANICKED.swap(true, Ordering::Relaxed) {
        halt();
    }
}

/// Says why, and returns to the firmware, from wherever the loader is, when somebody has seen that.
pub fn stop(why: fmt::Arguments<'_>, status: Status) -> ! {
    say(why);
    if has_firmware() {
        say(format_args!("press a key to return to the firmware"));
        say(format_args!("stopped"));
        wait_for_key();
        // SAFETY: the loader has no destructor that must run, and set up nothing that would use its
        // code or data later.
        let _ = unsafe { boot::exit(boot::image_handle(), status, 0, ptr::null_mut()) };
    }
    say(format_args!("stopped"));
    halt()
}

fn halt() -> ! {
    loop {
        interrupts::disable();
        hlt();
    }
}

/// Whether the firmware's console writes to a serial port too: one of its devices is at the end of a
/// line.
fn is_on_serial_port() -> bool {
    let devices = boot::locate_handle_buffer(SearchType::ByProtocol(&CONSOLE_OUT_DEVICE));
    devices.is_ok_and(|devices| {
        devices.iter().any(|device| {
            device_path(*device).is_some_and(|path| {
                path.node_iter().any(|node| {
                    (node.device_type(), node.sub_type())
                        == (DeviceType::MESSAGING, DeviceSubType::MESSAGING_UART)
                })
            })
        })
    })
}

/// Where a device is, if it is one.
pub fn device_path(handle: Handle) -> Option<boot::ScopedProtocol<DevicePath>> {
    let params = OpenProtocolParams { handle, agent: boot::image_handle(), controller: None };
    // SAFETY: nobody takes devices away while the loader runs: that is done by programs.
    unsafe { boot::open_protocol(params, OpenProtocolAttributes::GetProtocol) }.ok()
}
