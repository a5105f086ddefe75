#![no_main]

libfuzzer_sys::fuzz_target!(|input: &[u8]| airlift_stream::harness::frame_decoder(input));
