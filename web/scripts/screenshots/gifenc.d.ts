// What is used here of the encoder, which brings no types.

declare module "gifenc" {
  interface FrameOptions {
    /** Red, green, blue: 0..255 each; the first frame's holds for those that have none. */
    palette?: number[][];
    transparent?: boolean;
    transparentIndex?: number;
    /** Milliseconds. */
    delay?: number;
    dispose?: number;
  }

  interface Encoder {
    writeFrame(index: Uint8Array, width: number, height: number, options: FrameOptions): void;
    finish(): void;
    bytes(): Uint8Array;
  }

  const gifenc: {
    GIFEncoder(): Encoder;
    /** rgba: its buffer must hold nothing else. */
    quantize(rgba: Uint8Array, maxColours: number): number[][];
    applyPalette(rgba: Uint8Array, palette: number[][]): Uint8Array;
  };
  export default gifenc;
}
