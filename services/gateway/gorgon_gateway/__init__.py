"""The public API of Gorgon: WebSocket, REST and OpenAI, in front of one or several engines."""
